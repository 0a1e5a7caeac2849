"""A job server whose answers are a script, for what a real one does only on a bad day."""

import asyncio
from threading import Event, Thread

from aiohttp import web

from cluster.client import RUN
from tests.cluster.conftest import free_ports

LOG = [f"step {k:>9,}/12 | loss\n" for k in range(1, 13)]
JOB = {"type": "SUBMISSION", "entrypoint": "python", "message": "", "job_id": None}


NODE = {
    "node_id": "ab" * 28, "node_ip": "10.0.0.1", "is_head_node": True, "state": "ALIVE", "state_message": None, "node_name": "10.0.0.1",
    "resources_total": {"CPU": 4.0}, "labels": {},
}  # fmt: skip
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": ""}


def answer(value, status=200):
    async def handler(request):
        return web.json_response(value(), status=status)

    return handler


def job(job_id, run="", status="SUCCEEDED", start=1):
    return JOB | {"submission_id": job_id, "status": status, "start_time": start, "end_time": start + 5000, "metadata": {RUN: run}}


class Server:
    """The part of Ray's job server that a client asks: its answers are a script.

    Attributes:
        cuts: after how many lines each connection to the log breaks; the last one runs to the end.
        down: how many questions for the status go unanswered after each break.
    """

    def __init__(self):
        self.cuts, self.down, self.lines, self.statuses, self.connections, self.silent = [], 0, LOG, ["RUNNING"], 0, False
        self.jobs, self.submitted, self.token, self.package, self.dead = [], [], None, None, 0
        self.nodes, self.autoscaler = [NODE], None
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self.ready = Event()
        self.thread = Thread(target=self._serve, daemon=True)
        self.thread.start()
        assert self.ready.wait(20)

    def _serve(self):
        asyncio.set_event_loop(self.loop)
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        app.router.add_get("/api/version", answer(lambda: VERSION))
        app.router.add_get("/api/jobs/", answer(lambda: self.jobs))
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._status)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        app.router.add_get("/api/jobs/{id}/logs", answer(lambda: {"logs": "".join(self.lines)}))
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/cluster_status", answer(lambda: {"result": True, "data": {"clusterStatus": self.autoscaler}}))
        app.router.add_get("/api/v0/nodes", answer(self._nodes))
        app.router.add_get("/api/packages/gcs/{name}", answer(dict, 404))
        app.router.add_put("/api/packages/gcs/{name}", self._put)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        self.loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    def close(self):
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _nodes(self):
        counts = {key: len(self.nodes) for key in ("total", "num_after_truncation", "num_filtered")}
        result = counts | {"result": self.nodes, "partial_failure_warning": "", "warnings": []}
        return {"result": True, "msg": "", "data": {"result": result}}

    @web.middleware
    async def _guard(self, request, handler):
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            missing = "authorization" not in request.headers
            return web.Response(
                status=401 if missing else 403, text="Unauthorized: Missing authentication token" if missing else "Forbidden"
            )
        return await handler(request)

    async def _status(self, request):
        if self.dead:
            self.dead -= 1
            request.transport.close()
            return web.Response()
        if request.match_info["id"] == "nobody":
            return web.Response(status=404, text="Job nobody does not exist")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return web.json_response(JOB | {"submission_id": request.match_info["id"], "status": status, "metadata": {}})

    async def _tail(self, request):
        self.connections += 1
        socket_ = web.WebSocketResponse()
        await socket_.prepare(request)
        cut = self.cuts.pop(0) if self.cuts else len(self.lines)
        for k in range(0, cut, 5):  # as Ray does, several lines at once
            await socket_.send_str("".join(self.lines[k : min(cut, k + 5)]))
        if cut < len(self.lines):
            if self.silent:
                await socket_.receive()
            self.dead = self.down
            if request.transport is not None:
                request.transport.close()  # no goodbye
        else:
            self.statuses = ["SUCCEEDED"]
        return socket_

    async def _stop(self, request):
        self.statuses = ["RUNNING", "STOPPED"]
        return web.json_response({"stopped": True})

    async def _put(self, request):
        self.package = await request.read()
        return web.Response()

    async def _submit(self, request):
        self.submitted.append(await request.json())
        return web.json_response({"submission_id": self.submitted[-1]["submission_id"], "job_id": self.submitted[-1]["submission_id"]})
