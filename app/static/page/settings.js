/* The form of a walk down the chain: model, class, preset, and the rest folded. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { Chips, Picture } from "./parts.js";
import { balanced, presetOf, presetsOf } from "./presets.js";
import { spaced } from "./requests.js";
import { service } from "./service.js";
import { compact, count } from "./words.js";

export const MOST_IMAGES = 36;

export const defaults = (model) =>
  ({ label: null, images: 9, seed: "", guidance: 1, spacing: "",
    ...balanced(model) });

/* The t that a walk begins at, where it is not T. */
export const startOf = ({ t, source }) => (Number.isInteger(t) ? t : source?.t ?? null);

/* The settings that a job was made with, as far as its kind has them. Of a walk from t on: of one
   down the whole chain that is as dense. */
export function settingsOf(request, T) {
  const { kind, sampler, steps, spacing } = request;
  const from = startOf(request) ?? T;
  return {
    label: request.class_label ?? null,
    guidance: request.guidance ?? 1,
    ...(kind === "generate" && { images: Math.min(MOST_IMAGES, request.num_images) }),
    ...(sampler && {
      sampler, steps: Math.min(T, Math.round((steps * T) / from)), spacing: spacing ?? "" }),
  };
}

export function About({ model }) {
  const [channels, height, width] = model.shape;
  const facts = [
    `${height}×${width}${channels === 3 ? " in colour" : ""}`,
    `${model.schedule} schedule of ${model.T}`,
    model.parameters && `${compact(model.parameters / 1e6)} M parameters`,
  ].filter(Boolean).join(" · ");
  return html`<p class="about">${model.description || facts}</p>`;
}

/* thumbnail: of a model that brings none. */
export function ModelChoice({ model, onChange, thumbnail }) {
  const [own, setOwn] = useState(null);
  useEffect(() => { // a name may come to mean another model
    setOwn(model.thumbnail ? { url: `${model.thumbnail}#${model.digest}` } : null);
  }, [model.thumbnail, model.digest]);
  return html`<div class="model">
    <span class="thumbnail"><${Picture} picture=${own ?? thumbnail} alt="" /></span>
    <label>Model
      <select id="model" value=${model.name} onChange=${(e) => onChange(e.target.value)}>
        ${service.models.map(({ name, served }) =>
          html`<option value=${name}>${name}${served ? "" : " (no worker)"}</option>`)}
      </select></label>
    <${About} model=${model} />
  </div>`;
}

export function ClassChips({ model, value, onChange, label = "What to draw" }) {
  if (!model.class_names.length) return null;
  const options = [[null, "anything"], ...model.class_names.map((name, i) => [i, name])];
  return html`<${Chips} name="label" label=${label} value=${value} options=${options}
    onChange=${onChange} />`;
}

/* A number. While it is being written it stands as it is written, and counts where it is one. */
function NumberInput({ value, onChange, ...rest }) {
  const [text, write] = useState(null);
  const take = ({ target }) => {
    write(target.value);
    if (!Number.isNaN(target.valueAsNumber)) onChange(target.valueAsNumber);
  };
  return html`<input type="number" required ...${rest} value=${text ?? String(value)}
    onInput=${take} onBlur=${() => write(null)} />`;
}

const Field = ({ label, children, hint }) =>
  html`<label class="field"><span>${label}</span>${children}${hint && html`<small>${hint}</small>`}</label>`;

export function Settings({ model, settings, onChange, children }) {
  const preset = presetOf(model, settings);
  const presets = presetsOf(model);
  const set = (name) => (event) => onChange({ [name]: event.target.value });
  const number = (name) => (value) => onChange({ [name]: value });
  return html`
    <${ClassChips} model=${model} value=${settings.label} onChange=${(label) => onChange({ label })} />
    <${Chips} name="preset" label="How" value=${preset}
      options=${Object.entries(presets).map(([name, { words }]) => [name, words])}
      hint=${presets[preset]?.hint ?? `your own: ${settings.sampler} in ${count(settings.steps, "step")}`}
      onChange=${(name) => onChange(presets[name].settings)} />
    <details class="more" onInvalidCapture=${(event) => { event.currentTarget.open = true; }}><summary>Everything else</summary>
      <div class="fields">
        ${children}
        <${Field} label="Seed"><input id="seed" inputmode="numeric" pattern="[0-9]*" placeholder="any"
          title="A whole number, or nothing for any"
          value=${settings.seed} onInput=${set("seed")} /><//>
        <${Field} label="Sampler"><select id="sampler" value=${settings.sampler}
          onChange=${set("sampler")}>
          ${model.samplers.map((name) => html`<option value=${name}>${name}</option>`)}</select><//>
        <${Field} label="Steps"><${NumberInput} id="steps" min="1" max=${model.T}
          value=${settings.steps} onChange=${number("steps")} /><//>
        <${Field} label="Spacing"><select id="spacing" value=${spaced(settings) ? settings.spacing || model.sampling.spacing : ""}
          disabled=${!spaced(settings)} onChange=${set("spacing")}>
          ${!spaced(settings) && html`<option value="">of its table</option>`}
          ${model.spacings.map((name) => html`<option value=${name}>${name}</option>`)}</select><//>
        ${model.guidance && html`<${Field} label="Guidance" hint="1 is off; needs a class">
          <${NumberInput} id="guidance" min="0" max="50" step="any" value=${settings.guidance}
            disabled=${settings.label === null} onChange=${number("guidance")} /><//>`}
      </div>
    </details>`;
}

export function ImageCount({ settings, onChange }) {
  return html`<${Field} label="Images" hint=${`at most ${count(MOST_IMAGES, "image")} here`}>
    <${NumberInput} id="count" min="1" max=${MOST_IMAGES} value=${settings.images}
      onChange=${(images) => onChange({ images })} /><//>`;
}
