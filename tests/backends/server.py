"""An OpenAI-compatible server around a real local model, in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jaxalign.backends import Decoding


class Server:
    """/v1/chat/completions, /v1/completions and /v1/embeddings."""

    def __init__(self, model):
        self.model, self.asked, self.lock = model, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:  # one program at a time on the device
                    outer.asked.append((self.path, body))
                    reply = outer.reply(self.path, body)
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}#tiny"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def reply(self, path, body):
        if path == "/v1/embeddings":
            vectors = self.model.embed(body["input"])
            return {"data": [{"index": n, "embedding": v.tolist()} for n, v in enumerate(vectors)]}
        prompt = body["prompt"] if path == "/v1/completions" else body["messages"]
        decoding = Decoding(
            max_tokens=body["max_tokens"],
            temperature=float(body["temperature"]),
            top_p=float(body.get("top_p", 1.0)),
            stop=tuple(body.get("stop", ())),
            seed=body.get("seed", 0),
        )
        [[said]] = self.model.generate([prompt], decoding)
        reason = "stop" if said.finished else "length"
        choice = {"index": 0, "finish_reason": reason}
        if path == "/v1/completions":
            choice["text"] = said.text
        else:
            choice["message"] = {"role": "assistant", "content": said.text}
        used = {"prompt_tokens": 1, "completion_tokens": said.tokens}
        return {"choices": [choice], "usage": used}
