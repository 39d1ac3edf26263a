"""Ask llama.cpp about a GGUF file; run by the interpreter of an environment with xllamacpp.

    python ask_llama.py FILE JOB

JOB is JSON: `turns` (conversations), `texts` to tokenise, `prompts` of tokens, and the number of
`new` tokens for each. The last line of the output is JSON: `rendered`, `tokens` and `greedy`.
"""

import json
import sys
import urllib.request


def main(file: str, job: str) -> None:
    """Ask all of it, one request at a time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.use_jinja = 1024, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more wait on a busy machine
    # By default its cache is in float16, which moves log-probs by a thousandth of a nat.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, wanted = xllamacpp.Server(params), json.loads(job)

    def ask(path: str, **content: object) -> dict[str, object]:
        header = {"Content-Type": "application/json"}
        data = json.dumps(content).encode()
        request = urllib.request.Request(f"{server.listening_address}/{path}", data, header)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    rules = {"n_predict": wanted["new"], "temperature": 0.0, "return_tokens": True}
    answers = {
        "rendered": [ask("apply-template", messages=one)["prompt"] for one in wanted["turns"]],
        "tokens": [
            ask("tokenize", content=one, add_special=True, parse_special=True)["tokens"]
            for one in wanted["texts"]
        ],
        "greedy": [ask("completion", prompt=one, **rules)["tokens"] for one in wanted["prompts"]],
    }
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
