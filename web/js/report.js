// Shows on each node the text of its last run: the plan, or a stage's prediction and measurement.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const NODES = [
  "I2VVRAMBudget",
  "I2VEncode",
  "I2VChunkedSampler",
  "I2VVAETiledDecode",
  "I2VSaveVideo",
  "I2VSaveLatent",
  "I2VLoadLatent",
  "I2VBatch",
];
const WIDGET = "i2v_report";
const LINE_PIXELS = 15;
const MAX_HEIGHT_PIXELS = 260;

function reportWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const { widget } = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  if (widget.inputEl) widget.inputEl.readOnly = true;
  widget.options.read_only = true;
  // The text is output, not a setting: it is neither saved with the workflow nor sent with a prompt.
  widget.label = "last run";
  widget.serialize = false;
  widget.options.serialize = false;
  // As high as its text, up to a limit.
  widget.options.getMinHeight = () => Math.min(MAX_HEIGHT_PIXELS, LINE_PIXELS * (1 + widget.value.split("\n").length));
  return widget;
}

app.registerExtension({
  name: "i2v_budget.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (!message?.text) return;
      reportWidget(this).value = message.text.join("\n");
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], height)]);
      app.graph.setDirtyCanvas(true, false);
    };
  },
});
