/* The jobs of this browser, newest first: {id, kind, created, title, parent, picture, done}. */

import { Observable } from "./observable.js";
import { read, write } from "./storage.js";

const NAME = "ddpm-jobs";
const MOST = 60;

class History extends Observable {
  get all() {
    try {
      const found = JSON.parse(read(NAME));
      return Array.isArray(found) ? found : [];
    } catch {
      return [];
    }
  }

  set all(jobs) {
    write(NAME, JSON.stringify(jobs.slice(0, MOST)));
    this.changed();
  }

  of(id) { return this.all.find((job) => job.id === id); }

  /* Its pictures are there, or (done = false) no more. */
  finish(id, done = true) {
    if (!this.of(id) || Boolean(this.of(id).done) === done) return;
    this.all = this.all.map((job) => (job.id === id ? { ...job, done } : job));
  }
}

export const history = new History();
addEventListener("storage", ({ key }) => key === NAME && history.changed());

const LARGEST = 20_000; // of a picture that is remembered with its job

export function remember(job) {
  if (job.picture?.length > LARGEST) delete job.picture;
  history.all = [job, ...history.all.filter((other) => other.id !== job.id)];
}
