/* What this browser keeps for this address. Where that is forbidden, or full, it is kept while the
   page is open. */

const here = new Map();

const kept = (act) => {
  try { return act(localStorage); } catch { return undefined; }
};

export const read = (name) => here.get(name) ?? kept((all) => all.getItem(name)) ?? "";

export function write(name, text) {
  const done = kept((all) => {
    if (text) all.setItem(name, text); else all.removeItem(name);
    return true;
  });
  if (done) here.delete(name); else here.set(name, text);
}
