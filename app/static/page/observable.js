/* State that views follow. Changes within one frame of the screen are told once. */

import { useEffect, useReducer } from "./vendor/preact-htm.js";

export class Observable {
  #listeners = new Set();
  #due = false;

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  changed() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      for (const listener of [...this.#listeners]) listener();
    });
  }
}

/* Draw the component again whenever `thing` changes; `thing` may be null. */
export function useObservable(thing) {
  const [, again] = useReducer((n) => n + 1, 0);
  useEffect(() => {
    if (!thing) return undefined;
    again(); // for what changed before this effect ran
    return thing.subscribe(again);
  }, [thing]);
  return thing;
}
