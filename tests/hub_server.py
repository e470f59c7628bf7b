"""A Hugging Face Hub in the test's own process: real HTTP for the real client, the standard library on this side.

A repository is a list of commits, a commit maps a path to (sha256, size, whether it is LFS), and bytes lie in
blobs/SHA256. It speaks the LFS "basic" transfer and not Xet: clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_THRESHOLD = 10 * 1024 * 1024
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".arrow")
KINDS = "models|datasets|spaces"


class HubError(Exception):
    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub(ThreadingHTTPServer):
    """`with Hub(folder, tokens={"hf_alice": "alice"}) as hub:` serves at `hub.url`; `hub.log` lists the requests.

    `members` says who may write for an organisation. After `hub.uploads_left` uploads connections are dropped
    without an answer; `hub.on_upload` is called at each; a hub that `ignores_private` makes every repository public.
    """

    daemon_threads = True

    def __init__(self, root, tokens, members=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs = Path(root) / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.tokens, self.members = tokens, members or {}
        self.repos, self.log, self.lock = {}, [], threading.Lock()
        self.uploads_left, self.ignores_private, self.on_upload = None, False, None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def may_write(self, user, owner):
        return user == owner or user in self.members.get(owner, ())

    def sent(self):
        """Paths of what clients have written since the log was last cleared: files, and commits."""
        return [path for _, name, path in self.log if name in ("lfs_put", "commit", "create", "settings")]

    def put_blob(self, data):
        oid = hashlib.sha256(data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("PUT", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/settings", "settings"),
        ("POST", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/refs", "refs"),
        ("GET", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/commits/(?P<rev>[^/]+)", "commits"),
        ("GET", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", "info"),
        ("GET", rf"/api/(?P<kind>{KINDS})/(?P<id>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        (
            "HEAD",
            r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
            "resolve",
        ),
        ("GET", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def dispatch(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if method == self.command and match:
                    self.args = {k: unquote(v) if v else v for k, v in match.groupdict().items()}
                    self.server.log.append((self.command, name, url.path))
                    with self.server.lock:
                        return getattr(self, name)()
            self.server.log.append((self.command, "UNROUTED", self.path))
            raise HubError(404, "RepoNotFound", f"no route for {self.command} {url.path}")
        except ConnectionAbortedError:
            self.close_connection = True
        except HubError as err:
            self.reply({"error": err.message}, err.status, {"X-Error-Code": err.code, "X-Error-Message": err.message})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, payload, status=200, headers=None):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self, required=False):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name = self.server.tokens.get(token)
        if required and name is None:
            raise HubError(401, "Unauthorized", "Invalid credentials")
        return name

    def repo(self, write=False):
        """Private repos answer 404 RepoNotFound to strangers, gated ones 403 GatedRepo on content, as the Hub does."""
        user, repo = self.user(required=write), self.server.repos.get((self.args["kind"] or "models", self.args["id"]))
        is_ours = self.server.may_write(user, self.args["id"].split("/")[0])
        if repo is None or (repo["private"] and not is_ours):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not is_ours:
            raise HubError(403, "Forbidden", f"{user} cannot write to {self.args['id']}")
        return repo

    def files(self, repo):
        rev = self.args.get("rev") or "main"
        for commit in reversed(repo["commits"]):
            if rev in ("main", "HEAD", "refs/heads/main") or commit["sha"].startswith(rev):
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")

    def entry(self, path, file):
        oid, size, is_lfs = file
        row = {"type": "file", "path": path, "size": size, "oid": self.git_oid(oid)}
        return {**row, "lfs": {"oid": oid, "size": size, "pointerSize": 134}} if is_lfs else row

    def git_oid(self, oid):
        data = (self.server.blobs / oid).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def whoami(self):
        name = self.user(required=True)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.reply({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        data = json.loads(self.body)
        user = self.user(required=True)
        owner = data.get("organization") or user
        if not self.server.may_write(user, owner):
            raise HubError(403, "Forbidden", f"{user} cannot create a repository of {owner}")
        kind, repo_id = (data.get("type") or "model") + "s", f"{owner}/{data['name']}"
        if (kind, repo_id) in self.server.repos:
            raise HubError(409, "Conflict", "You already created this repo")
        private = data.get("visibility", "private" if data.get("private") else "public") == "private"
        private = private and not self.server.ignores_private
        self.server.repos[kind, repo_id] = {"private": private, "gated": False, "commits": []}
        self.add_commit(self.server.repos[kind, repo_id], "initial commit", {})
        prefix = "" if kind == "models" else kind + "/"
        self.reply({"url": f"{self.server.url}/{prefix}{repo_id}", "name": repo_id, "private": private})

    def delete(self):
        data = json.loads(self.body)
        owner = data.get("organization") or self.user(required=True)
        self.args = {"kind": (data.get("type") or "model") + "s", "id": f"{owner}/{data['name']}"}
        self.repo(write=True)
        del self.server.repos[self.args["kind"], self.args["id"]]
        self.reply({})

    def settings(self):
        repo, data = self.repo(write=True), json.loads(self.body)
        if "visibility" in data or "private" in data:
            repo["private"] = data.get("visibility", "private" if data.get("private") else "public") == "private"
        repo["gated"] = data.get("gated", repo["gated"])
        self.reply({})

    def info(self):
        repo = self.repo()
        commit = self.files(repo)
        self.reply({
            "id": self.args["id"], "sha": commit["sha"], "private": repo["private"], "gated": repo["gated"],
            "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": commit["date"],
            "createdAt": repo["commits"][0]["date"], "siblings": [{"rfilename": p} for p in sorted(commit["files"])],
        })  # fmt: skip

    def refs(self):
        head = self.repo()["commits"][-1]["sha"]
        self.reply(
            {
                "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": head}],
                "converts": [],
                "tags": [],
                "pullRequests": [],
            }
        )

    def commits(self):
        rows = [
            {"id": c["sha"], "title": c["title"], "message": "", "date": c["date"], "authors": []}
            for c in reversed(self.repo()["commits"])
        ]
        self.reply(rows, headers={"X-Total-Count": str(len(rows))})

    def tree(self):
        files, base = self.files(self.repo())["files"], (self.args["path"] or "").strip("/")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows = {}
        for path, file in sorted(files.items()):
            rel = path.removeprefix(base + "/") if base else path
            if base and not path.startswith(base + "/"):
                continue
            parts = rel.split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    folder = "/".join(filter(None, [base, *parts[:depth]]))
                    rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                rows[path] = self.entry(path, file)
        if base and not rows:
            raise HubError(404, "EntryNotFound", f"{base} does not exist")
        self.reply(list(rows.values()))

    def paths_info(self):
        files = self.files(self.repo())["files"]
        form = parse_qs(self.body.decode()) if b"{" not in self.body[:1] else json.loads(self.body)
        rows = []
        for path in form["paths"] if isinstance(form["paths"], list) else [form["paths"]]:
            if path in files:
                rows.append(self.entry(path, files[path]))
            elif any(p.startswith(path.rstrip("/") + "/") for p in files):
                rows.append({"type": "directory", "path": path.rstrip("/"), "size": 0, "oid": "0" * 40})
        self.reply(rows)

    def resolve(self):
        repo = self.repo()
        if repo["gated"] and not self.server.may_write(self.user(), self.args["id"].split("/")[0]):
            raise HubError(403 if self.user() else 401, "GatedRepo", "Access to this repo is restricted")
        commit = self.files(repo)
        if self.args["path"] not in commit["files"]:
            raise HubError(404, "EntryNotFound", "Entry not found")
        oid, size, _ = commit["files"][self.args["path"]]
        data, status, headers = (self.server.blobs / oid).read_bytes(), 200, {}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
            data, status, headers = data[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
        self.reply(
            data, status, {"ETag": f'"{oid}"', "X-Repo-Commit": commit["sha"], "Accept-Ranges": "bytes", **headers}
        )

    def preupload(self):
        commit = self.files(self.repo(write=True))
        rows = []
        for file in json.loads(self.body)["files"]:
            lfs = file["size"] > LFS_THRESHOLD or file["path"].endswith(LFS_SUFFIXES)
            old = commit["files"].get(file["path"])
            row = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            rows.append({**row, "oid": old[0] if old[2] else self.git_oid(old[0])} if old else row)
        self.reply({"files": rows, "commitOid": commit["sha"]})

    def lfs_batch(self):
        self.args["kind"] = self.args["kind"] or "models"
        self.repo(write=True)
        objects = []
        for obj in json.loads(self.body)["objects"]:
            if not (self.server.blobs / obj["oid"]).exists():
                obj["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{obj['oid']}", "header": {}}}
            objects.append(obj)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self):
        if self.server.uploads_left is not None:
            if not self.server.uploads_left:
                self.connection.shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError
            self.server.uploads_left -= 1
        if self.server.on_upload:
            self.server.on_upload()
        if self.server.put_blob(self.body) != self.args["oid"]:
            raise HubError(400, "BadRequest", "oid does not match content")
        self.reply({})

    def commit(self):
        repo = self.repo(write=True)
        files, title, description = dict(self.files(repo)["files"]), "", ""
        for line in filter(None, self.body.split(b"\n")):
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title, description = value["summary"], value.get("description", "")
                if value.get("parentCommit", repo["commits"][-1]["sha"]) != repo["commits"][-1]["sha"]:
                    raise HubError(412, "PreconditionFailed", "A commit has happened since")
            elif key == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = (self.server.put_blob(data), len(data), False)
            elif key == "lfsFile":
                if not (self.server.blobs / value["oid"]).exists():
                    raise HubError(400, "BadRequest", f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = (value["oid"], (self.server.blobs / value["oid"]).stat().st_size, True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        sha = self.add_commit(repo, title, files, description)
        prefix = "" if self.args["kind"] == "models" else self.args["kind"] + "/"
        self.reply(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.server.url}/{prefix}{self.args['id']}/commit/{sha}",
                "hookOutput": "",
            }
        )

    def add_commit(self, repo, title, files, description=""):
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        parent = repo["commits"][-1]["sha"] if repo["commits"] else ""
        sha = hashlib.sha1(json.dumps([parent, title, date, sorted(files.items())]).encode()).hexdigest()
        repo["commits"].append({"sha": sha, "title": title, "description": description, "date": date, "files": files})
        return sha
