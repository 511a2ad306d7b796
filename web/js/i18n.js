// The panel's texts in the page's language. They lie with the nodes' own, in locales/*/main.json, from where the host
// gives them to the page; English stands in for what a language lacks.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SECTION = "i2vBudget";

const fetched = api.fetchApi("/i18n").then((response) => response.json());
let texts = {};
export const textsRead = fetched.then((locales) => (texts = locales), () => {});

// The language that the page is in, such as "zh".
export const language = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

// The text named `key`, with each $name in it filled in from `values`.
export function t(key, values = {}) {
  const text = texts[language()]?.[SECTION]?.[key] ?? texts.en?.[SECTION]?.[key] ?? key;
  return text.replace(/\$(\w+)/g, (_, name) => values[name]);
}
