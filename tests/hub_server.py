"""A Hub of a few repositories on this machine: what huggingface_hub asks of the real one.

Serves models: create, preupload, LFS and plain upload, commit, branches, info, tree, resolve.
A commit holds a whole snapshot and lands at once, or not at all. Files of weights go by LFS.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet")


def digest(content, kind="sha1"):
    return hashlib.new(kind, content).hexdigest()


@dataclass
class Repository:
    """Commits by id, each {path: content}, and branches by name, each the id of a commit."""

    owner: str
    private: bool
    commits: dict = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})

    def resolve(self, revision):
        """Return the id of a commit, None if there is no such branch or commit."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch, files):
        listed = sorted((path, digest(content)) for path, content in files.items())
        commit = digest(repr((listed, len(self.commits))).encode())
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class Refusal(Exception):
    """An answer that is no success: status, error code, message."""

    def __init__(self, status, code, message, **more):
        super().__init__(code)
        self.status, self.code, self.message, self.more = status, code, message, more


class HubServer:
    """Runs in a thread until closed.

    repositories, by id, are there to look into. fail(pattern, status) makes the next request whose
    "METHOD /path" matches fail.
    """

    def __init__(self):
        self.tokens = {"hf_of_user": "user", "hf_of_other": "other"}
        self.repositories = {}
        self.blobs = {}
        self.requests = []
        self._failures = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern, status=400):
        self._failures.append((pattern, status))

    def check_failures(self, request):
        for failure in self._failures:
            if re.search(failure[0], request):
                self._failures.remove(failure)
                raise Refusal(failure[1], "Planned", "this request was to fail")

    # ------------------------------------------------------------------------------------- answers

    def repository(self, name, user, *, write=False):
        """Return a repository that `user` may read, or write.

        Anonymous visitors get 401 and users 404, for what is private and for what is not there.
        """
        repository = self.repositories.get(name)
        if repository is None or (repository.private and repository.owner != user):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and repository.owner != user:
            raise Refusal(403 if user else 401, "Forbidden", "You have no right to write here")
        return repository

    def create(self, user, body):
        if user is None:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        name = f"{body.get('organization') or user}/{body['name']}"
        if name.split("/")[0] != user:
            raise Refusal(403, "Forbidden", f"You have no right to create under {name}")
        if name in self.repositories:
            raise Refusal(409, "Conflict", "You already created it", url=f"{self.url}/{name}")
        private = body.get("private") or body.get("visibility") == "private"
        self.repositories[name] = Repository(user, bool(private))
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def commit(self, repository, branch, lines, name):
        """Make all operations of a commit or none of them."""
        files = dict(repository.files(branch))
        for operation in map(json.loads, lines):
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refusal(400, "BadRequest", f"{value['path']} was not uploaded")
                files[value["path"]] = self.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(branch, files)
        return {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}

    def describe(self, repository, commit, name):
        files = repository.commits[commit]
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        return {
            "id": name, "modelId": name, "sha": commit, "private": repository.private,
            "tags": [], "downloads": 0, "siblings": siblings,
        }  # fmt: skip

    def tree(self, files, wanted):
        return [
            {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
            for path, content in files.items()
            if wanted(path)
        ]

    def lfs_batch(self, body):
        """Say where to upload what is not here yet."""
        objects = [{"oid": each["oid"], "size": each["size"]} for each in body["objects"]]
        for each in objects:
            if each["oid"] not in self.blobs:
                href = f"{self.url}/lfs/{each['oid']}"
                each["actions"] = {"upload": {"href": href, "header": {}}}
        return {"transfer": "basic", "objects": objects}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        path, data = urlsplit(self.path).path, self.body()
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            self.hub.check_failures(request)
            self.reply(*self.answer([unquote(part) for part in path.split("/")[1:]], token, data))
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.reply({"error": refusal.message, **refusal.more}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, parts, token, data):
        hub, user = self.hub, self.hub.tokens.get(token)
        match parts:
            case ["api", "whoami-v2"]:
                role = {"accessToken": {"role": "write"}}
                return ({"name": user, "type": "user", "orgs": [], "auth": role},)
            case ["api", "validate-yaml"]:
                return ({"errors": [], "warnings": []},)
            case ["api", "repos", "create"]:
                return (hub.create(user, json.loads(data)),)
            case ["api", "models", owner, name, *rest]:
                return (self.model(f"{owner}/{name}", rest, user, data),)
            case ["lfs", oid] if digest(data, "sha256") == oid:  # signed by its address: no token
                hub.blobs[oid] = data
                return (b"",)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                hub.repository(f"{owner}/{name.removesuffix('.git')}", user, write=True)
                return (hub.lfs_batch(json.loads(data)),)
            case [owner, name, "resolve", revision, *path]:
                return self.file(hub.repository(f"{owner}/{name}", user), revision, "/".join(path))
        raise Refusal(404, "NotFound", f"nothing is served at {self.path}")

    def model(self, name, rest, user, data):
        hub = self.hub
        writes = bool(rest) and rest[0] in ("preupload", "commit", "branch")
        repository = hub.repository(name, user, write=writes)
        match rest:
            case ["preupload", _]:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(data)["files"]
                ]
                return {"files": modes}
            case ["commit", branch]:
                self.commit_of(repository, branch)
                return hub.commit(repository, branch, data.splitlines(), name)
            case ["branch", branch]:
                if branch in repository.branches:
                    raise Refusal(409, "Conflict", "Reference already exists")
                repository.branches[branch] = repository.branches["main"]
                return {}
            case ["refs"]:
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                    for branch, commit in repository.branches.items()
                ]
                return {"branches": branches, "converts": [], "tags": []}
            case ["tree", revision, *folder]:
                files = repository.commits[self.commit_of(repository, revision)]
                return hub.tree(files, lambda path: path.startswith("/".join(folder)))
            case ["paths-info", revision]:
                files = repository.commits[self.commit_of(repository, revision)]
                return hub.tree(files, json.loads(data)["paths"].__contains__)
            case [] | ["revision", _]:
                commit = self.commit_of(repository, rest[1] if rest else "main")
                return hub.describe(repository, commit, name)
        raise Refusal(404, "NotFound", f"nothing is served at {self.path}")

    def commit_of(self, repository, revision):
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def file(self, repository, revision, path):
        commit = self.commit_of(repository, revision)
        if path not in repository.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = repository.commits[commit][path]
        return content, 200, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit}
