/* Ways to walk the chain, for who does not want to choose: the model says what each stands for. */

import { spaced } from "./requests.js";
import { count } from "./words.js";

const PAPERS = "the paper's chain, exactly";
const WORDS = {
  fast: ["Fast", "nearly the same quality for the least work"],
  balanced: ["Balanced", "the model's own default"],
  faithful: ["Faithful", "the best that this model gives"], // where it is not the paper's
};
const isThePapers = ({ sampler, steps }, { T }) => sampler === "ddpm" && steps === T;

const settings = ({ sampler, steps, spacing }) => ({ sampler, steps, spacing });

/* What a model's default is, which is all there is with a worker of an older version. */
const own = (model) => ({ sampler: model.sampling.sampler, steps: model.steps,
  spacing: model.sampling.spacing });

/* Name → {words, hint, settings} of a model's presets. */
export function presetsOf(model) {
  const said = Object.keys(model.presets ?? {}).length ? model.presets : { balanced: own(model) };
  return Object.fromEntries(Object.entries(said).map(([name, preset]) => {
    const [words, why] = WORDS[name] ?? [name, ""];
    const said = isThePapers(preset, model) ? PAPERS : why;
    const hint = `${preset.sampler} in ${count(preset.steps, "step")}${said && `: ${said}`}`;
    return [name, { words, hint, settings: settings(preset) }];
  }));
}

/* The settings that a form begins with. */
export const balanced = (model) => (presetsOf(model).balanced?.settings ?? own(model));

/* The name of the preset that these settings are; none when they are one's own. */
export function presetOf(model, { sampler, steps, spacing }) {
  const found = Object.entries(presetsOf(model)).find(([, { settings: its }]) =>
    its.sampler === sampler && its.steps === steps
      && (!spaced(its) || its.spacing === (spacing || model.sampling.spacing)));
  return found?.[0];
}
