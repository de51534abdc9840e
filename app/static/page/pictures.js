/* Pictures that a visitor brings, and the forward process on them.

x is [C,H,W] in −1..1 and of 8 bits, exactly as the service will read the PNG. */

import { call, create, get, pause } from "./api.js";

const SOON_MS = 50;
const SELDOM_MS = 2_000;

export function blank([, height, width]) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const paper = canvas.getContext("2d", { willReadFrequently: true });
  paper.fillStyle = "#000";
  paper.fillRect(0, 0, width, height);
  return paper;
}

/* Grey as Pillow has it. */
const grey = (r, g, b) => (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;

/* What is on this paper of the model's size: {x, png (base64), src, name}. */
export function pictureOn(paper, shape, name = "picture") {
  const [channels, height, width] = shape;
  const pixels = paper.getImageData(0, 0, width, height);
  const { data } = pixels;
  const size = height * width;
  const x = new Float32Array(channels * size);
  for (let i = 0; i < size; i++) {
    const rgb = data.subarray(4 * i, 4 * i + 3);
    if (channels === 1) rgb.fill(grey(...rgb));
    data[4 * i + 3] = 255;
    for (let c = 0; c < channels; c++) x[c * size + i] = data[4 * i + (c % 3)] / 127.5 - 1;
  }
  paper.putImageData(pixels, 0, 0);
  const src = paper.canvas.toDataURL("image/png");
  return { x, src, png: src.slice(src.indexOf(",") + 1), name, shape };
}

/* Any picture file, whole and centred on black. Throws Error where it is none. */
export async function pictureOf(blob, shape, name) {
  const image = await createImageBitmap(blob).catch(() => {
    throw new Error(`${name}: is no picture that this browser can read`);
  });
  const picture = pictureIn(image, shape, name);
  image.close();
  return picture;
}

/* The same of an address that fetch may not ask: data:. */
export async function pictureFrom(src, shape, name) {
  const image = Object.assign(new Image(), { src });
  await image.decode();
  return pictureIn(image, shape, name);
}

function pictureIn(image, shape, name) {
  const [, height, width] = shape;
  const paper = blank(shape);
  paper.imageSmoothingQuality = "high";
  const scale = Math.min(width / image.width, height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  paper.imageSmoothingEnabled = scale < 1;
  paper.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  return pictureOn(paper, shape, name);
}

export async function pictureAt(url, shape, name) {
  return pictureOf(await (await call(url)).blob(), shape, name);
}

/* x in −1..1 as a picture: −1 black, 1 white, the rest clipped. */
export function shown(x, shape) {
  const [channels, height, width] = shape;
  const paper = blank(shape);
  const pixels = paper.getImageData(0, 0, width, height);
  const size = height * width;
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = Math.round((x[(c % channels) * size + i] + 1) * 127.5);
    }
  }
  paper.putImageData(pixels, 0, 0);
  return { src: paper.canvas.toDataURL("image/png") };
}

/* x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε */
export function noised(x, eps, alphaBar) {
  const [signal, noise] = [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
  return x.map((value, i) => signal * value + noise * eps[i]);
}

/* A small job that this page needs to draw itself, at its end. One that is not wanted any more
   (`signal`) is canceled. It is looked at again and again: a request that waited would hold one of
   the six connections that a browser has for all its tabs. */
async function answer(kind, body, signal) {
  let job = await create(kind, { ...body, ttl_s: 3600 }, signal);
  try {
    for (let ms = SOON_MS; job.status === "queued" || job.status === "running";
      ms = Math.min(1.5 * ms, SELDOM_MS)) {
      await pause(ms, signal);
      job = await get(`jobs/${job.id}`, { signal });
    }
  } catch (error) {
    if (signal.aborted) {
      call(`jobs/${job.id}/cancel`, { method: "POST", again: true }).catch(() => {});
    }
    throw error;
  }
  if (job.status !== "succeeded") throw new Error(job.error?.detail ?? job.status);
  return job;
}

/* The ε of a seed, as POST /noise draws it for a first image. */
export async function epsOf(model, picture, seed, signal) {
  const job = await answer("noise", {
    model: model.name, images: [picture.png], t: [model.T], kinds: ["eps"], seed }, signal);
  const file = await call(`jobs/${job.id}/snapshots/${model.T}/0.npy?kind=eps`, { signal });
  return floats(await file.arrayBuffer());
}

/* float32 of an .npy file of version 1. */
export function floats(buffer) {
  const length = new DataView(buffer).getUint16(8, true);
  return new Float32Array(buffer.slice(10 + length));
}

/* x̂_0 of x_t: one DDIM step from t lands there. */
export async function guess(model, picture, { t, seed, label = null }, signal) {
  const job = await answer("reconstruct", {
    model: model.name, images: [picture.png], t, seed, sampler: "ddim", steps: 1,
    ...(label === null ? {} : { class_label: label }) }, signal);
  return { url: job.images[0].url };
}
