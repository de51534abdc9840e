/* What an <img> shows of a picture. A picture is {png: base64} where its event brought it, {src} where
   it was made here, else {url}: fetched once, as an <img> could send no key. */

import { call } from "./api.js";

const MOST_KEPT = 300;
const kept = new Map(); // address → {src: blob:, once it is there; asked: Promise of it}

const addressOf = ({ url }) => url?.replace(/^\//, "");

export function sourceOf(picture) {
  if (!picture) return "";
  if (picture.png) return `data:image/png;base64,${picture.png}`;
  return picture.src || kept.get(addressOf(picture))?.src || "";
}

export function fetched(picture) {
  const address = addressOf(picture);
  if (!kept.has(address)) {
    const entry = { src: "" };
    entry.asked = call(address).then((reply) => reply.blob()).then((blob) => {
      entry.src = URL.createObjectURL(blob);
      forget();
      return entry.src;
    });
    entry.asked.catch(() => kept.delete(address));
    kept.set(address, entry);
  }
  return kept.get(address).asked;
}

/* All but the last: a blob stays until its address is revoked. What shows one of them goes on to, and
   whatever would show it anew fetches it again. */
function forget() {
  for (const [address, { src }] of kept) {
    if (kept.size <= MOST_KEPT) return;
    if (!src) continue; // still on its way
    URL.revokeObjectURL(src);
    kept.delete(address);
  }
}
