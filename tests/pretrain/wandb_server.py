"""A stand-in for a W&B server, which the real client is content with, and what it was sent."""

import json
import re
from http.server import BaseHTTPRequestHandler

KEY = "0123456789" * 4


class Backend(BaseHTTPRequestHandler):
    """As much of a W&B server as the real client needs to create, resume and fill a run."""

    rows: dict[str, list[str]]
    runs: dict[str, dict]  # what was said of a run: config, tags, summary, exit code
    files: dict[str, bytes]
    url: str

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.files[self.path.lstrip("/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/graphql":
            body = json.loads(raw)
            name = re.search(r"(?:query|mutation) (\w+)", body["query"]).group(1)
            self.answer({"data": self.graphql(name, body.get("variables") or {})})
        elif run := re.search(r"/([^/]+)/file_stream$", self.path):
            body = json.loads(raw)
            sent = body.get("files", {})
            if history := sent.get("wandb-history.jsonl"):
                self.rows[run[1]][history["offset"] :] = history["content"]
            if summary := sent.get("wandb-summary.json"):
                self.runs[run[1]]["summary"] = json.loads(summary["content"][-1])
            if "exitcode" in body:
                self.runs[run[1]]["exit_code"] = body["exitcode"]
            self.answer({"limits": {}})
        else:
            self.answer({})

    def graphql(self, name, given):
        run = given.get("name")
        place = {"id": "p", "name": "shardopt", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            rows = self.rows.setdefault(run, [])
            self.runs.setdefault(run, {}).update({k: v for k, v in given.items() if v is not None})
            bucket = {"id": "r", "name": run, "config": "{}", "project": place, "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if name == "RunResumeStatus":
            rows = self.rows.get(run)
            bucket = rows and {
                "id": "r", "name": run, "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
                "summaryMetrics": rows[-1], "historyTail": json.dumps(rows[-1:]), "eventsTail": "[]",
                "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            }  # fmt: skip
            return {"model": {**place, "bucket": bucket} if rows else None}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def answer(self, reply):
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def online(backend, home):
    """A key for the server in `home`, as `wandb login` leaves it."""
    host = backend.url.removeprefix("http://")
    (home / ".netrc").write_text(f"machine {host} login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)


def rows_on(backend, run_id):
    """The rows of a run, without what W&B adds to them."""
    rows = map(json.loads, backend.rows[run_id])
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
