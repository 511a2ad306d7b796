// Shows what the last run of I2V Save Video wrote: a video, a GIF or images. The page itself keeps a node's first kind of
// preview, and treats a GIF as a still image; this fixes both, for nodes on the classic canvas.
import { app } from "../../../scripts/app.js";

const PREVIEWS = ["video-preview", "$$comfy_animation_preview", "$$canvas-image-preview"];

function removePreview(node) {
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
      const animated = (message?.images ?? []).some(({ filename }) => filename.endsWith(".gif"));
      removePreview(this);
      Object.defineProperty(this, "animatedImages", { get: () => animated, set: () => {}, configurable: true });
      onExecuted?.apply(this, arguments);
    };
  },
});
