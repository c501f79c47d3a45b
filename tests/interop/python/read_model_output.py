"""Read a run with the stream decoder of a model's package: read_model_output.py PACKAGE URL.

Each package fetches the stream itself, by the method that it has for addresses of others. A line
is printed for each object that it gives.
"""
import importlib
import json
import sys

package, url = sys.argv[1:]
module = importlib.import_module(package)
Client = {"openai": "OpenAI", "anthropic": "Anthropic"}[package]
client = getattr(module, Client)(api_key="none", base_url=url, max_retries=0)
if package == "openai":
    from openai.types.chat import ChatCompletionChunk as Chunk
else:
    from anthropic.types import RawMessageStreamEvent as Chunk
stream = client.get("", cast_to=Chunk, options={"params": {"since": "all", "channel": "run"}},
                    stream=True, stream_cls=module.Stream[Chunk])
for chunk in stream:
    print(json.dumps(chunk.to_dict()), flush=True)
