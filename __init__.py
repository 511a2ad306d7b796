"""Entry point for ComfyUI. Imports nothing up front: the host asks for the nodes when it is ready."""

WEB_DIRECTORY = "./web/js"


async def comfy_entrypoint():
    from .nodes import I2VBudgetExtension

    return I2VBudgetExtension()
