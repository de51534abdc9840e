/* Small pieces that several places use. */

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { call } from "./api.js";
import { fetched, sourceOf } from "./sources.js";
import { count, seconds } from "./words.js";

/* One picture of a run, in hard pixels; its box keeps its size while it is empty. onGone: told where
   the service has it no more. */
export function Picture({ picture, alt, onGone }) {
  const [src, setSrc] = useState(sourceOf(picture));
  useEffect(() => {
    let here = true;
    const there = sourceOf(picture);
    if (there || !picture) setSrc(there);
    else fetched(picture).then((found) => here && setSrc(found), ({ status }) => {
      if (here) setSrc("");
      if (status === 404 || status === 410) onGone?.();
    });
    return () => { here = false; };
  }, [picture]);
  const now = sourceOf(picture) || src;
  return now
    ? html`<img class="picture" src=${now} alt=${alt} decoding="sync" draggable=${false} />`
    : html`<span class="picture void" role="img" aria-label=${`${alt}: not there yet`}></span>`;
}

/* How a job goes, in words; what changes with each step is not read out. service: to tell whether
   anybody works. */
export function Progress({ run, service }) {
  const { job, progress, error } = run;
  const counted = error ? "" : countOf(run, service);
  const live = job?.status === "running" || job?.status === "succeeded"; // these fit one line
  const share = run.status === "succeeded" ? 1 : progress ? progress.step / progress.total : 0;
  return html`<div class="progress" data-job=${run.id}>
    <div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100"
      aria-valuenow=${Math.round(100 * share)}><i style=${{ transform: `scaleX(${share})` }}></i></div>
    <p class=${error || job?.error ? "bad long" : live ? "" : "long"} id="status"><span role="status">${
      error || (counted ? "" : wordsOf(run, service))}</span>${counted}</p>
    ${(job?.warnings ?? []).map(({ detail }) => html`<p class="long warning">${detail}</p>`)}
  </div>`;
}

/* How far it is while it runs; "" before its first step. */
function countOf({ job, progress, t, images, count: all }, service) {
  if (job?.status !== "running" || service.idle) return "";
  const left = progress?.eta_s == null ? "" : ` · ${seconds(progress.eta_s)} left`;
  if (job.kind === "likelihood" && progress) {
    return `${progress.step} of ${count(progress.total, pieces(job))}${left}`;
  }
  const done = images.filter(Boolean).length;
  if (done) return `${done} of ${count(all, "image")}${left}`;
  return t == null ? "" : `${count(all, "image")} at t = ${t}${left}`;
}

function wordsOf(run, service) {
  const { job, progress } = run;
  if (!job) return "Looking for the job…";
  if (job.status === "queued") {
    if (service.idle) {
      return "Waiting: no worker is running. The job is kept, and starts when one does.";
    }
    const before = job.queue_position;
    return before ? `Waiting: ${count(before, "job")} before this one` : "Waiting for its turn";
  }
  if (job.status === "running") {
    return service.idle ? "No worker is running: the job goes on when one is there." : "Starting";
  }
  if (job.status === "succeeded") {
    const took = (new Date(job.completed_at) - new Date(job.started_at)) / 1000;
    const time = Number.isFinite(took) ? ` in ${seconds(took)}` : "";
    const what = job.kind === "likelihood" ? count(progress?.total ?? 0, pieces(job)) : count(run.count, "image");
    return `${what}${time} · seed ${job.request.seed}`;
  }
  if (job.status === "expired") return "Its pictures have been deleted; the settings are still here.";
  if (job.status === "canceled") return "Canceled. What there was is kept.";
  return job.error?.detail ?? "It failed.";
}

/* What a likelihood is counted in. */
const pieces = (job) => job.request.mode === "flow" ? "evaluation" : "term";

/* A modal window of the browser's own, which keeps the focus. With onClose it closes with Escape too;
   without, it stays for as long as it is drawn. */
export function Modal({ title, onClose, children }) {
  const dialog = useRef();
  useEffect(() => {
    const { current } = dialog;
    current.showModal();
    return () => current.close(); // so that the focus goes back
  }, []);
  const stay = () => dialog.current?.showModal(); // a second Escape closes it, whatever one says
  return html`<dialog ref=${dialog} aria-label=${title} onClose=${onClose ?? stay}
    onCancel=${(event) => onClose || event.preventDefault()}>
    <header><h2>${title}</h2>
      ${onClose && html`<button type="button" class="quiet" aria-label="Close"
        onClick=${() => dialog.current.close()}>✕</button>`}</header>
    ${children}
  </dialog>`;
}

/* Save a file of the service; a plain link would send no key. */
export async function download(path, name) {
  const url = URL.createObjectURL(await (await call(path)).blob());
  save(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function save(url, name) {
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

/* Cancel a run, as long as it is not asked for yet. */
export const Cancel = ({ run, onError }) => html`<button type="button" id="cancel"
  disabled=${!run?.live || run.job?.cancel_requested}
  onClick=${() => run.cancel().catch(onError)}>Cancel</button>`;

/* A group of radio buttons that look like chips. options: [value, words]. */
export function Chips({ name, label, value, options, onChange, hint }) {
  return html`<fieldset class="chips"><legend>${label}</legend>
    ${options.map(([option, words]) => html`<label key=${option}>
      <input type="radio" name=${name} value=${option} checked=${option === value}
        onChange=${() => onChange(option)} /><span>${words}</span></label>`)}
    ${hint && html`<p class="hint">${hint}</p>`}
  </fieldset>`;
}

export function NoModels({ service }) {
  return html`<div class="work"><p class="empty">${service.known
    ? "No model is known yet: the first worker that starts brings its models."
    : "Asking the service for its models…"}</p></div>`;
}
