// I2V Save Video shows a film, a GIF or pictures, whichever its last run wrote. The page keeps a node to what it showed
// first, and takes a GIF for a still: both are put right here, for nodes drawn on the canvas.
import { app } from "../../../scripts/app.js";

const PREVIEWS = ["video-preview", "$$comfy_animation_preview", "$$canvas-image-preview"];

function forgetPreview(node) {
  for (const widget of node.widgets?.filter(({ name }) => PREVIEWS.includes(name)) ?? []) {
    widget.onRemove?.();
    node.widgets.splice(node.widgets.indexOf(widget), 1);
  }
  node.imgs = node.images = node.videoContainer = node.previewMediaType = undefined;
}

app.registerExtension({
  name: "i2v_budget.save_video",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "I2VSaveVideo") return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      const moves = (message?.images ?? []).some(({ filename }) => filename.endsWith(".gif"));
      forgetPreview(this);
      Object.defineProperty(this, "animatedImages", { get: () => moves, set: () => {}, configurable: true });
      onExecuted?.apply(this, arguments);
    };
  },
});
