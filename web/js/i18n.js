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
export function t(key, values = {}, otherwise = key) {
  const text = texts[language()]?.[SECTION]?.[key] ?? texts.en?.[SECTION]?.[key] ?? otherwise;
  return text.replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
}

// What the server says: its name and values, and the English for a page that has no text of that name.
export const said = ({ key, values, text }) => t(key, values, text);
