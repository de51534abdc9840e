/* Queue: who works, at what rate, what waits, and the jobs of this browser. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { get, pause } from "./api.js";
import { history } from "./history.js";
import { useObservable } from "./observable.js";
import { Picture } from "./parts.js";
import { jobLink } from "./router.js";
import { service } from "./service.js";
import { ago, compact, count, seconds } from "./words.js";

const SHOWN = 24;
const EVERY_MS = 4_000;
const ENDED = new Set(["succeeded", "failed", "canceled", "expired"]);

/* Kinds whose pictures are one long row. */
const IN_A_ROW = new Set(["interpolate", "noise"]);

/* The state of this browser's jobs: those that have ended are asked for once. */
function useStates(jobs) {
  const [states, setStates] = useState({});
  useEffect(() => {
    const gone = new AbortController();
    const { signal } = gone;
    let known = states;
    const look = async () => {
      for (const { id } of jobs) {
        if (ENDED.has(known[id]?.status) || known[id]?.gone) continue;
        const job = await get(`jobs/${id}`, { signal }).catch((error) =>
          (error.status === 404 ? { gone: true } : null));
        signal.throwIfAborted();
        if (job) known = { ...known, [id]: { status: job.status, gone: job.gone, progress: job.progress,
          eta: job.eta_s, before: job.queue_position } };
        if (job?.status === "succeeded") history.finish(id);
        setStates(known);
      }
    };
    const watch = async () => {
      for (;;) {
        if (!document.hidden) await look();
        await pause(EVERY_MS, signal);
      }
    };
    watch().catch((error) => { if (!signal.aborted) throw error; });
    return () => gone.abort();
  }, [jobs.map(({ id }) => id).join()]);
  return states;
}

const wordsOf = (state) => {
  if (!state) return "…";
  if (state.gone) return "deleted";
  if (state.status === "queued") return state.before ? `${count(state.before, "job")} before it` : "next";
  if (state.status !== "running" || !state.progress) return state.status;
  return `${Math.round((100 * state.progress.step) / state.progress.total)} %`;
};

function Mine() {
  useObservable(history);
  const jobs = history.all.slice(0, SHOWN);
  const states = useStates(jobs);
  return html`<section aria-labelledby="mine"><h2 id="mine">Jobs of this browser</h2>
    ${jobs.length === 0
      ? html`<p class="hint">None yet. <a href="#generate">Generate something.</a></p>`
      : html`<ul class="jobs">${jobs.map((job) => html`<${Job} key=${job.id} job=${job}
          state=${states[job.id]} />`)}</ul>`}
  </section>`;
}

function Job({ job, state }) {
  const grid = state?.status === "succeeded" && job.kind !== "likelihood";
  const [picture] = useState({ url: `jobs/${job.id}/grid.png` });
  return html`<li><a href=${jobLink(job.id)} class=${IN_A_ROW.has(job.kind) ? "long" : ""}>
    <${Picture} picture=${grid ? picture : null} alt="" />
    <span class="what"><b>${job.title}</b><small>${job.kind} · ${ago(job.created)}</small></span>
    <span class=${`state ${state?.status ?? ""}`}>${wordsOf(state)}</span></a></li>`;
}

/* How many of a worker's slots are taken; images beyond them take turns. */
const taken = ({ active, slots }) => (slots == null ? active : Math.min(active, slots));

const load = (worker) => {
  if (worker.slots == null) return `${count(worker.active, "image")} in flight`;
  const beyond = worker.active - taken(worker);
  return `${taken(worker)} of ${count(worker.slots, "slot")} taken${beyond ? `, ${beyond} take turns` : ""}`;
};

/* Until all is done: queues are worked off side by side. Unknown where it is of one of them. */
function left(queues) {
  const busy = queues.filter((queue) => queue.image_steps > 0);
  if (!busy.length) return "none";
  if (busy.some((queue) => queue.eta_s == null)) return "–";
  return seconds(Math.max(...busy.map((queue) => queue.eta_s)));
}

const Figure = ({ value, words }) => html`<div class="figure"><b>${value}</b>
  <small>${words}</small></div>`;

export function Queue() {
  useObservable(service);
  const { queues, workers, models } = service;
  const sum = (name) => queues.reduce((total, queue) => total + (queue[name] ?? 0), 0);
  const rates = models.map((model) => model.image_steps_per_s).filter(Boolean);
  const slots = workers.reduce((n, worker) => n + (worker.slots ?? 0), 0);
  const used = workers.reduce((n, worker) => n + taken(worker), 0);
  const waiting = sum("queued");
  const paused = queues.filter((queue) => queue.paused);
  return html`<div class="work">
    <p class="lead" role="status">${!service.known ? "Asking the service…"
      : service.idle
        ? "No worker is running. Jobs are taken in and wait; they start when a worker does."
        : waiting
          ? `Busy: ${count(waiting, "job")} ${waiting === 1 ? "waits" : "wait"}, and all of them will be done.`
          : sum("running") ? "At work; nothing waits." : "Idle: whatever comes next starts at once."}
      ${paused.length > 0 && ` Paused: ${paused.map((queue) => queue.name).join(", ")}.`}</p>
    <div class="figures">
      <${Figure} value=${workers.length} words=${workers.length === 1 ? "worker" : "workers"} />
      <${Figure} value=${sum("running")} words="running" />
      <${Figure} value=${waiting} words="waiting" />
      <${Figure} value=${slots ? `${used} / ${slots}` : used} words="slots taken" />
      <${Figure} value=${rates.length ? compact(Math.max(...rates)) : "–"} words="image-steps a second" />
      <${Figure} value=${left(queues)} words="of work left" />
    </div>
    <div class="columns">
      <section aria-labelledby="workers"><h2 id="workers">Workers</h2>
        ${workers.length === 0 ? html`<p class="hint">None.</p>` : html`<ul class="plain">
          ${workers.map((worker) => html`<li key=${worker.name}><b>${worker.name}</b><small>${[
            worker.device, ...worker.models, load(worker)].join(" · ")}</small></li>`)}</ul>`}</section>
      <section aria-labelledby="models"><h2 id="models">Models</h2>
        <ul class="plain">${models.map((model) => html`<li key=${model.name}><b>${model.name}</b><small>${[
          model.shape.join("×"), `T = ${model.T}`, model.served ? "served" : "no worker has it",
          model.image_steps_per_s && `${compact(model.image_steps_per_s)} image-steps/s`,
          ].filter(Boolean).join(" · ")}</small></li>`)}</ul></section>
    </div>
    <${Mine} />
  </div>`;
}
