// Helpers for building the pack's panels.
const GIB = 2 ** 30;
const MIB = 2 ** 20;

export function element(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

// Formats bytes with a non-breaking space before the unit.
export const amount = (bytes) =>
  bytes < 0.1 * GIB ? `${(bytes / MIB).toFixed(1)}\u00a0MiB` : `${(bytes / GIB).toFixed(2)}\u00a0GiB`;

// Adds a style sheet from the folder of the scripts.
export function useStyle(name) {
  document.head.append(element("link", { rel: "stylesheet", href: new URL(name, import.meta.url).href }));
}
