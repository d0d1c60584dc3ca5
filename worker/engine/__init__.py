"""The embedded inference engine: the part of vLLM's HTTP protocol that Perennial uses, on Transformers and PyTorch.

It serves a base model and many LoRA adapters at once, on a CPU or one GPU, so that a first step needs no vLLM. The
main path, in reading order: `app` (HTTP) -> `engine` (names, prompts, limits) -> `loop` (continuous batching) ->
`runner` (one forward of mixed adapters) -> `sampling` -> `generation` (stop conditions, text) -> `responses`.
"""
