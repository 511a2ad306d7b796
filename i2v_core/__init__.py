"""Image-to-video within a VRAM budget: predict, plan, execute exactly, recover. Knows nothing of ComfyUI."""
