// The panels' texts in the page's language, from locales/*/main.json as served by the host; English is the fallback.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SECTION = "i2vBudget";

const localesRequest = api.fetchApi("/i18n").then((response) => response.json());
let texts = {};
export const textsLoaded = localesRequest.then((locales) => (texts = locales), () => {});

// Returns the language of the page, such as "zh".
export const language = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

// Returns the text for `key`, with each $name replaced from `values`; `fallback` if no language has the key.
export function t(key, values = {}, fallback = key) {
  const text = texts[language()]?.[SECTION]?.[key] ?? texts.en?.[SECTION]?.[key] ?? fallback;
  return text.replace(/\$(\w+)/g, (match, name) => values[name] ?? match);
}

// Returns the text for a message of the server: key and values, with its English text as the fallback.
export const messageText = ({ key, values, text }) => t(key, values, text);
