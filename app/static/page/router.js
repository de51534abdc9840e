/* Four places and one link for each job: #generate, #noise, #look, #queue, #job=ID.

A place may be given a picture to work on: #noise&picture=JOB/INDEX. */

import { Observable } from "./observable.js";

export const PLACES = { generate: "Generate", noise: "Noise", look: "Look inside", queue: "Queue" };

/* Where a job is shown. */
export function placeOf(job) {
  if (!job) return "generate";
  if (job.kind === "noise" || job.kind === "likelihood") return "look";
  const branch = job.kind === "reconstruct" && typeof job.request.source === "object";
  return job.kind === "generate" || branch ? "generate" : "noise";
}

/* As a part of an address, whatever a link says: with nothing in it that leads elsewhere. */
const idOf = (text) => text && (text.replace(/[^\w-]/g, "") || "none");

class Router extends Observable {
  latest = {}; // place → id of the job that was shown there last

  constructor() {
    super();
    this.#read();
    addEventListener("hashchange", () => { this.#read(); this.changed(); });
  }

  #read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    this.job = idOf(asked.get("job"));
    this.place = Object.keys(PLACES).find((place) => asked.has(place)) ?? "generate";
    const [job, index] = (asked.get("picture") ?? "").split("/");
    this.picture = job ? { job: idOf(job), index: Number.parseInt(index, 10) || 0 } : null;
  }
}

export const router = new Router();

export const jobLink = (id) => `#job=${id}`;

export function show(id) { location.hash = jobLink(id); }
