/* What lies on the desk: the model, how its chain is walked, and the pictures at hand, by slot. It
   stays while one goes from place to place. */

import { history } from "./history.js";
import { Observable, useObservable } from "./observable.js";
import { pictureAt, pictureFrom } from "./pictures.js";
import { router } from "./router.js";
import { start } from "./runs.js";
import { service } from "./service.js";
import { defaults, settingsOf } from "./settings.js";
import { useEffect, useRef, useState } from "./vendor/preact-htm.js";

class Desk extends Observable {
  #name = null; // of the model; null: nobody has chosen, the first
  #settings = { of: null, said: {} };
  #slots = {};
  #coming = {}; // slot → Promise of a picture that is on its way there
  #taken = null;

  get model() { return service.model(this.#name) ?? service.models[0]; }

  /* Those of this model: another has other samplers and classes. */
  get settings() {
    const { of, said } = this.#settings;
    return { ...defaults(this.model), ...(of === this.model.name ? said : {}) };
  }

  /* Pictures a and b and the mask, each null where there is none of this model's size. */
  get slots() {
    const shape = this.model?.shape.join();
    return Object.fromEntries(["a", "b", "mask"].map((slot) =>
      [slot, this.#slots[slot]?.shape.join() === shape ? this.#slots[slot] : null]));
  }

  put(slot, picture) {
    delete this.#coming[slot]; // it was wanted before this one
    this.#slots = { ...this.#slots, [slot]: picture };
    this.choose(this.model.name);
  }

  /* Put a picture there once it has come, unless another was wanted there since. */
  async bring(slot, coming) {
    this.#coming[slot] = coming;
    const wanted = () => this.#coming[slot] === coming;
    try {
      const picture = await coming;
      if (wanted()) this.put(slot, picture);
    } catch (error) {
      if (!wanted()) return;
      delete this.#coming[slot];
      throw error;
    }
  }

  /* Put it where nothing is, nor will be soon. */
  offer(slot, picture) {
    if (!this.slots[slot] && !this.#coming[slot]) this.put(slot, picture);
  }

  change(some) {
    this.#settings = { of: this.model.name, said: { ...this.settings, ...some } };
    this.choose(this.model.name);
  }

  choose(name) {
    this.#name = name;
    this.changed();
  }

  /* The model and the settings that this job was made with, but its seed: other images of the kind. */
  lend({ model, request }) {
    this.#settings = { of: model, said: { ...settingsOf(request, service.model(model).T), seed: "" } };
    this.choose(model);
  }

  /* The picture that the address names, once for each time that it does. */
  take(named, say) {
    if (!this.model || this.#taken === named) return;
    this.#taken = named;
    const { job, index } = named;
    this.bring("a", pictureAt(`jobs/${job}/images/${index}.png`, this.model.shape,
      `image ${index + 1} of a job`)).catch((error) => {
      this.#taken = null; // so that whoever comes by again gets it
      say(error);
    });
  }
}

export const desk = new Desk();

/* Ask for jobs, one at a time, and show them; say: told of what is refused, or null. */
export function useAsk(say) {
  const [asking, setAsking] = useState(false);
  const ask = async (...job) => {
    setAsking(true);
    say(null);
    try {
      await start(...job);
    } catch (error) {
      say(error);
    } finally {
      setAsking(false);
    }
  };
  return [asking, ask];
}

/* The desk. A job that is opened by its link lends it its model and settings. */
export function useDesk(run) {
  useObservable(service);
  useObservable(desk);
  useObservable(run);
  const known = Boolean(service.model(run?.job?.model));
  useEffect(() => {
    if (!known || run.taken) return;
    run.taken = true;
    desk.lend(run.job);
  }, [run, known]);
  return desk;
}

/* The same with the picture of the address on it, or the one that this run was made of. say: told of
   errors. */
export function usePictures(run, say) {
  useDesk(run);
  useObservable(router);
  const { model } = desk;
  useEffect(() => { if (router.picture) desk.take(router.picture, say); },
    [router.picture, model?.name]);
  const own = useOwn(run, service.model(run?.job?.model), say);
  useEffect(() => {
    if (!own || run.laid) return;
    run.laid = true;
    desk.offer("a", own);
  }, [own]);
  return desk;
}

/* Where what has been asked for here is shown, which comes into sight: on a phone it is below the form. */
export function useResult(run) {
  const shown = useRef();
  useEffect(() => {
    if (run?.fresh) shown.current?.scrollIntoView({ block: "nearest" });
    if (run) run.fresh = false;
  }, [run?.id]);
  return shown;
}

/* The picture that a run was made of, as far as this browser remembers it; else null. */
export function useOwn(run, model, say) {
  const [own, setOwn] = useState({ of: null, picture: null });
  const src = run?.madeOf ?? (run && history.of(run.id)?.picture);
  useEffect(() => {
    if (!src || !model) return undefined;
    let here = true;
    pictureFrom(src, model.shape, "the picture of this job").then(
      (picture) => here && setOwn({ of: run.id, picture }), say);
    return () => { here = false; };
  }, [src, run?.id, model?.shape.join()]);
  return own.of === run?.id ? own.picture : null;
}
