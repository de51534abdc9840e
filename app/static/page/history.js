/* The jobs of this browser, newest first: {id, kind, created, title, parent, picture}. */

import { Observable } from "./observable.js";

const NAME = "ddpm-jobs";
const MOST = 60;

class History extends Observable {
  get all() {
    try {
      const found = JSON.parse(localStorage.getItem(NAME) ?? "[]");
      return Array.isArray(found) ? found : [];
    } catch {
      return [];
    }
  }

  set all(jobs) {
    try {
      localStorage.setItem(NAME, JSON.stringify(jobs.slice(0, MOST)));
    } catch { /* full, or forbidden: then nothing is remembered */ }
    this.changed();
  }

  of(id) { return this.all.find((job) => job.id === id); }

  forget(id) { this.all = this.all.filter((job) => job.id !== id); }
}

export const history = new History();
addEventListener("storage", ({ key }) => key === NAME && history.changed());

export function remember(job) {
  history.all = [job, ...history.all.filter((other) => other.id !== job.id)];
}
