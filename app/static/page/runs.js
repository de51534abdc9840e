/* Jobs as this page holds them: what has been seen of each chain, live or long ago. */

import { Refusal, call, create, follow, get, pause } from "./api.js";
import { history, remember } from "./history.js";
import { Observable } from "./observable.js";
import { show } from "./router.js";

const MOST_KEPT = 8;
const EVERY_MS = 4_000;
const ENDED = new Set(["succeeded", "failed", "canceled", "expired"]);

export class Run extends Observable {
  job = null; // as the service told it last
  taken = false; // whether the form has its settings
  laid = false; // whether its picture has been put on the desk
  fresh = false; // asked for here, and not yet brought into sight
  madeOf = null; // the address of the picture that it was made of, where it was asked for here
  error = ""; // why there is nothing to see
  progress = null; // {step, total, eta_s}, never going back
  t = null; // the smallest seen
  frames = new Map(); // t → {x_t: [picture], x_start: [picture]}
  latest = []; // of each image: {x_t, x_start}, the last that came
  images = [];
  #times = null;
  #abort = null;

  constructor(id, job = null) {
    super();
    this.id = id;
    this.job = job;
  }

  get status() { return this.job?.status ?? "queued"; }

  get ended() { return ENDED.has(this.status); }

  get live() { return !this.ended && !this.error; }

  /* Where the request does not say it (of pictures that were brought): as many as have come. */
  get count() {
    const { num_images, lambdas } = this.job?.request ?? {};
    return num_images ?? lambdas?.length ?? Math.max(1, this.images.length, this.latest.length);
  }

  /* The t that were kept, largest first. */
  get times() {
    this.#times ??= [...this.frames.keys()].sort((a, b) => b - a);
    return this.#times;
  }

  /* The kept t nearest to this one; 0 is the finished image. */
  nearest(t) {
    const all = this.images.length ? [...this.times, 0] : this.times;
    return all.reduce((best, other) =>
      (Math.abs(other - t) < Math.abs(best - t) ? other : best), all[0] ?? 0);
  }

  picture(t, kind, index) {
    return t === 0 ? this.images[index] : this.frames.get(t)?.[kind]?.[index];
  }

  /* Follow it; again where that has failed, which may have been in passing. */
  open() {
    if (this.#abort && !this.error) return;
    this.error = "";
    const abort = this.#abort = new AbortController();
    this.#watch(abort.signal).catch((error) => {
      if (abort.signal.aborted) return;
      abort.abort(); // what still goes on beside it
      const gone = error instanceof Refusal && error.status === 404;
      this.error = gone ? "There is no such job, or it has been deleted." : error.message;
      this.changed();
    });
    this.changed();
  }

  close() {
    this.#abort?.abort();
    this.#abort = null;
  }

  async cancel() {
    this.#told(await (await call(`jobs/${this.id}/cancel`, { method: "POST", again: true })).json());
  }

  async #watch(signal) {
    this.#told(await get(`jobs/${this.id}`, { signal }));
    if (this.status === "expired") return;
    this.#countDown(signal).catch(() => {}); // the events say that the service is away
    for await (const event of follow(this.id, signal)) this.#take(event);
    this.#told(await get(`jobs/${this.id}`, { signal }));
  }

  /* How many wait before it, which no event tells. */
  async #countDown(signal) {
    while (this.status === "queued") {
      await pause(EVERY_MS, signal);
      if (document.hidden) continue;
      const { status, queue_position } = await get(`jobs/${this.id}`, { signal });
      if (status === "queued" && this.status === "queued") {
        this.job = { ...this.job, queue_position };
        this.changed();
      }
    }
  }

  #told(job) {
    this.job = job;
    if (job.progress) this.#advance(job.progress);
    for (const snapshot of job.snapshots ?? []) this.#snapshot(snapshot);
    for (const image of job.images ?? []) this.images[image.index] ??= { url: image.url };
    if (job.status === "succeeded") history.finish(job.id);
    this.changed();
  }

  #take({ name, data }) {
    if (name === "reset") this.#told(data.job);
    else if (name === "status") this.job = { ...this.job, status: data.status };
    else if (name === "progress") this.#advance(data);
    else if (name === "snapshot") this.#snapshot(data);
    else if (name === "image") this.images[data.index] = this.#best(this.images[data.index], data);
    else if (name === "done") this.job = { ...this.job, status: data.status };
    else if (name === "error") this.job = { ...this.job, status: data.status, error: data };
    this.changed();
  }

  /* A job that goes on elsewhere repeats some steps; what people see does not. */
  #advance({ step, total, t, eta_s }) {
    this.progress = { step: Math.max(step, this.progress?.step ?? 0), total, eta_s };
    if (t != null) this.t = Math.min(t, this.t ?? t);
  }

  /* Fill in a state of the chain from elsewhere; t = 0 is the image. */
  put(t, kind, index, src) {
    if (t === 0) this.images[index] = { src };
    else this.#snapshot({ t, kind, index, src });
  }

  #snapshot({ t, kind, index, png, url, src }) {
    if (!this.frames.has(t)) {
      this.frames.set(t, {});
      this.#times = null;
    }
    const frame = this.frames.get(t);
    const row = (frame[kind] ??= []);
    row[index] = src ? { src } : this.#best(row[index], { png, url });
    this.t = Math.min(t, this.t ?? t);
    const last = (this.latest[index] ??= { t });
    if (t <= last.t) {
      last.t = t;
      last[kind] = row[index];
    }
  }

  #best(known, { png, url }) {
    return known?.png ? known : { png, url };
  }
}

const kept = new Map(); // id → Run, the least used first

export function runOf(id, job = null) {
  const run = kept.get(id) ?? new Run(id, job);
  kept.delete(id);
  kept.set(id, run);
  for (const [old, other] of kept) {
    if (kept.size <= MOST_KEPT) break;
    other.close();
    kept.delete(old);
  }
  return run;
}

/* Ask for a job, and show it unless the visitor has gone elsewhere meanwhile. about: what this
   browser remembers of it. lends: its settings are not those of the form, and are to go there. */
export async function start(kind, body, about = {}, { lends = false } = {}) {
  const here = location.hash;
  const job = await create(kind, body);
  remember({ id: job.id, kind, created: job.created_at, ...about });
  const run = runOf(job.id, job);
  run.open(); // wherever the visitor is by now
  run.fresh = run.laid = true;
  run.madeOf = about.picture;
  run.taken = !lends; // else the form has its settings already
  if (location.hash === here) show(job.id);
}
