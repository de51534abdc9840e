/* Three ways to walk the chain, for who does not want to choose. */

/* fast: DDIM's 50 steps, of the same quality by the model's card at half the work. balanced: what
   the model's own defaults say. faithful: the paper's chain, every one of the T steps. */
export const PRESETS = {
  fast: {
    words: "Fast",
    hint: (model) => `ddim in ${Math.min(50, model.T)} steps: half the work, nearly the same quality`,
    settings: (model) => ({ sampler: "ddim", steps: Math.min(50, model.T) }),
    suits: (model) => model.samplers.includes("ddim"),
  },
  balanced: {
    words: "Balanced",
    hint: (model) => `${model.sampling.sampler} in ${model.steps} steps: the model's own default`,
    settings: (model) => ({ sampler: model.sampling.sampler, steps: model.steps }),
    suits: () => true,
  },
  faithful: {
    words: "Faithful",
    hint: (model) => `ddpm in all ${model.T} steps: the paper's chain, exactly`,
    settings: (model) => ({ sampler: "ddpm", steps: model.T }),
    suits: (model) => model.samplers.includes("ddpm"),
  },
};

/* The name of the preset that these settings are, or "own". */
export function presetOf(model, { sampler, steps, spacing }) {
  if (spacing && spacing !== model.sampling.spacing) return "own";
  const found = Object.entries(PRESETS).find(([, preset]) => {
    const its = preset.settings(model);
    return preset.suits(model) && its.sampler === sampler && its.steps === steps;
  });
  return found?.[0] ?? "own";
}
