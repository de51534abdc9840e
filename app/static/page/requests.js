/* What this page asks the service for. */

import { PLACES, placeOf } from "./router.js";

const PICTURES_A_JOB = 720; // in events: the service keeps 2,000 of a job
const SLOW = new Set(["slow-2g", "2g", "3g"]);

/* How many states of each chain to watch: fewer of many images, and on a slow line. */
export function frames(images) {
  const most = SLOW.has(navigator.connection?.effectiveType) ? 12 : 40;
  return Math.max(6, Math.min(most, Math.floor(PICTURES_A_JOB / (2 * images))));
}

export const watched = (steps, images) =>
  ({ every: Math.max(1, Math.ceil(steps / frames(images))), kinds: ["x_t", "x_start"] });

/* Whether the spacing is a choice: a tuned table has its own timesteps. */
export const spaced = ({ sampler }) => sampler !== "tuned";

/* The fields that every walk down the chain has, from the settings of the form. */
export function chain(model, settings, images, steps = settings.steps) {
  const request = { model: model.name, sampler: settings.sampler, steps };
  if (spaced(settings) && settings.spacing && settings.spacing !== model.sampling.spacing) {
    request.spacing = settings.spacing;
  }
  if (settings.label !== null) {
    request.class_label = settings.label;
    if (model.guidance && settings.guidance !== 1) request.guidance = settings.guidance;
  }
  return { ...request, snapshots: watched(steps, images) };
}

/* One that people can say to each other; the service would draw one of 16 figures. */
export const shortSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

export function generation(model, settings) {
  const request = { ...chain(model, settings, settings.images), num_images: settings.images };
  request.seed = settings.seed === "" ? shortSeed() : Number(settings.seed);
  return request;
}

/* The same for many ways from one x_t: where the sampler draws no noise they would all be one. */
const MANY = { sampler: "ddpm", steps: 100 };

export const many = (model, settings) =>
  (model.draws.includes(settings.sampler) ? settings
    : { ...settings, ...MANY, steps: Math.min(model.T, Math.max(settings.steps, MANY.steps)) });

/* The same for one way from an x_t: a tuned table is of whole chains alone. */
export const onward = (model, settings) => (spaced(settings) ? settings
  : { ...settings, sampler: model.sampling.sampler, steps: model.steps, spacing: "" });

/* From t on, as densely as the whole chain would go; in two steps at least, as the last draws no
   noise. */
export const stepsFrom = (t, T, steps) => Math.min(t, Math.max(2, Math.round((steps * t) / T)));

/* Samples of what a picture may be under a mask. The service knows best in how many steps. */
const RESTORED_IN = 246; // evaluations by default, to choose what to watch

export function filling(model, settings, { images, mask, count, seed }) {
  const label = settings.label === null ? {} : { class_label: settings.label };
  return {
    model: model.name, images, operator: { name: "mask", mask }, num_images: count, seed, ...label,
    snapshots: watched(RESTORED_IN, count),
  };
}

/* Only these are asked for, whatever the file of a stranger says: a kind is part of an address. */
const KINDS = ["generate", "noise", "reconstruct", "restore", "encode", "interpolate", "likelihood"];

/* The state of another job that this one goes on from, or null. */
export const parentOf = ({ source }) => (typeof source === "object" && source ? source : null);

/* How many pictures of one's own a request of this kind needs. */
export function ownPictures(kind, request) {
  if (kind === "generate" || parentOf(request)) return 0;
  return kind === "interpolate" ? 2 : 1;
}

/* What a manifest asks for. Throws Error. */
export function again({ kind = "generate", ...request }) {
  if (!KINDS.includes(kind)) {
    throw new Error(`kind = ${JSON.stringify(kind)}: must be one of ${KINDS.join(", ")}`);
  }
  const missing = request.images ? 0 : ownPictures(kind, request);
  if (missing) {
    throw new Error(`This ${kind} was made from ${missing === 2 ? "two pictures" : "a picture"}, and a `
      + `manifest holds none: bring ${missing === 2 ? "them" : "it"} at ${
        PLACES[placeOf({ kind, request })]}, and ask there.`);
  }
  return { kind, request };
}

const OURS = new Set(["kind", "snapshots", "provenance", "model_digest", "source", "ttl_s",
  "priority", "format"]);
const UNSAID = new Set(["deterministic", "corrector_steps", "eta"]);

/* A request as a person would write it: without what only this page wants to see. */
export function plain(request) {
  const said = Object.entries(request).filter(([name, value]) =>
    value !== null && !OURS.has(name)
    && !(name === "guidance" && value === 1) && !(UNSAID.has(name) && !value));
  const source = parentOf(request);
  return { ...Object.fromEntries(said), ...(source && { source }) };
}
