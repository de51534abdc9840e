/* Who works and what waits, asked every few seconds while somebody looks. */

import { get } from "./api.js";
import { Observable } from "./observable.js";

const EVERY_MS = 4_000;

class Service extends Observable {
  models = [];
  queues = [];
  workers = [];
  known = false; // whether the service has answered at all
  #schedules = new Map();

  model(name) { return this.models.find((model) => model.name === name); }

  get idle() { return this.known && this.workers.length === 0; }

  /* β, ᾱ and SNR of a model, fetched once: {t, alpha_bar, snr}. */
  schedule(name) {
    if (!this.#schedules.has(name)) {
      const asked = get(`models/${name}/schedule`);
      asked.catch(() => this.#schedules.delete(name));
      this.#schedules.set(name, asked);
    }
    return this.#schedules.get(name);
  }

  async look() {
    const [queue, models] = await Promise.all([get("queue"), get("models")]);
    Object.assign(this, { queues: queue.queues, workers: queue.workers, models: models.data });
    this.known = true;
    this.changed();
  }

  async watch() {
    for (;;) {
      if (!document.hidden || !this.known) await this.look().catch(() => {});
      await new Promise((go) => setTimeout(go, EVERY_MS));
    }
  }
}

export const service = new Service();
