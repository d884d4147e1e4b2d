"""Weight files without a framework: safetensors and MindSpore's .ckpt, read and written in chunks."""
