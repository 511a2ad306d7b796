// What the pack's panels are drawn of.
const GIB = 2 ** 30;
const MIB = 2 ** 20;

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// With a space that does not break.
export const amount = (bytes) =>
  bytes < 0.1 * GIB ? `${(bytes / MIB).toFixed(1)}\u00a0MiB` : `${(bytes / GIB).toFixed(2)}\u00a0GiB`;

// Adds a style sheet that lies beside the scripts.
export function useStyle(name) {
  document.head.append(element("link", { rel: "stylesheet", href: new URL(name, import.meta.url).href }));
}
