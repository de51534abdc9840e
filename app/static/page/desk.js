/* What lies on the desk of Noise and Look inside: the pictures at hand, by slot, and the model.
   It stays while one goes from place to place. */

import { history } from "./history.js";
import { Observable, useObservable } from "./observable.js";
import { pictureAt, pictureFrom } from "./pictures.js";
import { router } from "./router.js";
import { service } from "./service.js";
import { useEffect } from "./vendor/preact-htm.js";

class Desk extends Observable {
  slots = { a: null, b: null };
  modelName = null;
  #taken = "";

  get model() { return service.model(this.modelName) ?? service.models[0]; }

  put(slot, picture) {
    this.slots = { ...this.slots, [slot]: picture };
    this.changed();
  }

  choose(name) {
    this.modelName = name;
    this.slots = { a: null, b: null }; // of another size
    this.changed();
  }

  /* The picture that the address names. */
  async take({ job, index }, say) {
    const url = `jobs/${job}/images/${index}.png`;
    if (!this.model || this.#taken === url) return;
    this.#taken = url;
    try {
      this.put("a", await pictureAt(url, this.model.shape, `image ${index + 1} of a job`));
    } catch (error) {
      say(error);
    }
  }
}

export const desk = new Desk();

/* The desk, with the picture of the address on it, or the one that this run was made of. say: told
   of errors. */
export function useDesk(run, say) {
  useObservable(service);
  useObservable(router);
  useObservable(desk);
  const { model } = desk;
  useEffect(() => { if (router.picture) desk.take(router.picture, say); },
    [router.picture?.job, router.picture?.index, model?.name]);
  useEffect(() => {
    const src = run && history.of(run.id)?.picture;
    if (!src || !model || desk.slots.a) return;
    pictureFrom(src, model.shape, "the picture of this job").then((it) => desk.put("a", it), say);
  }, [run?.id, model?.name]);
  return desk;
}
