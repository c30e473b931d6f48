"""The model card's name and its two JSON Schemas, byte for byte as Cloudflare publishes them."""

import pathlib

MODEL = "@cf/meta/llama-2-7b-chat-fp16"

_FOLDER = pathlib.Path(__file__).parent
INPUT_SCHEMA = (_FOLDER / "input.json").read_bytes()
OUTPUT_SCHEMA = (_FOLDER / "output.json").read_bytes()
