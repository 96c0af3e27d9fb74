"""Serves the adapters of many users on one base model, over HTTP.

Several replicas, each a process with its own copy of the base, share one
folder of adapter files. A replica gathers the requests of different users into
one batch. Adapters come, change and go while it serves: through any replica,
or by any other process that has a bank on the folder, such as one that trains.

    pip install -e ".[serve,hub,torch]"
    KERAS_BACKEND=torch python examples/serve.py --folder users --replicas 2

    curl -X PUT --data-binary @ann.vera.safetensors localhost:8000/users/ann
    curl -d '{"user": "ann", "text": "a b c"}' localhost:8000
    curl -X DELETE localhost:8000/users/ann
    curl localhost:8000/users
    curl localhost:8000/health

`Replica` knows nothing of Ray Serve: `--server plain` puts it behind the HTTP
server of Python instead, and another server can do the same. Without
`--preset`, the base is a tiny one with random weights.
"""

import argparse
import asyncio
import http
import http.server
import json
import os
import tempfile
import urllib.parse

import keras
import keras_hub
import numpy as np

import keras_vera


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="users", help="of adapter files")
    parser.add_argument("--task", choices=["classify", "generate"])
    parser.add_argument("--preset", help="of a KerasHub model")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--server", choices=["ray", "plain"])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--capacity", type=int, default=256, help="adapters in memory"
    )
    parser.add_argument("--batch", type=int, default=64, help="largest batch")
    parser.add_argument(
        "--wait", type=float, default=0.005, help="seconds, to fill a batch"
    )
    parser.set_defaults(task="classify", server="ray")
    return parser.parse_args()


# ---- The base.


def make_model(args):
    """Returns the base, adapted; the same weights in every process."""
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    if args.preset and args.task == "classify":
        model = models.TextClassifier.from_preset(
            args.preset, num_classes=args.classes
        )
    elif args.preset:
        model = models.CausalLM.from_preset(args.preset)
    elif args.task == "classify":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        model = models.BertTextClassifier(
            models.BertBackbone(
                vocabulary_size=len(words),
                num_layers=2,
                num_heads=2,
                hidden_dim=32,
                intermediate_dim=64,
                max_sequence_length=16,
            ),
            num_classes=args.classes,
            preprocessor=models.BertTextClassifierPreprocessor(
                models.BertTokenizer(words), sequence_length=16
            ),
        )
    else:
        characters = ["<|endoftext|>", *"abcdefgh"]
        model = models.GPT2CausalLM(
            models.GPT2Backbone(
                vocabulary_size=len(characters),
                num_layers=2,
                num_heads=2,
                hidden_dim=32,
                intermediate_dim=64,
                max_sequence_length=16,
            ),
            preprocessor=models.GPT2CausalLMPreprocessor(
                models.GPT2Tokenizer(
                    {x: i for i, x in enumerate(characters)}, merges=[]
                ),
                sequence_length=16,
            ),
        )
        model.compile(sampler="greedy")
    keras_vera.enable_vera(model, rank=args.rank)
    return model


# ---- A replica, for any server.


class Replica:
    """Answers requests of users, each with an adapter of its own.

    Its methods may be called from several threads. Each returns an HTTP
    status, and what JSON can hold.

    Args:
        model: The base, adapted.
        folder: String, the folder of adapter files. It must exist: a replica
            that made it anew would not see that it is away.
        capacity: Integer, the number of adapters in memory.
        generates: Boolean, whether answers are texts.
    """

    def __init__(self, model, folder, capacity, generates=False):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"There is no folder '{folder}'.")
        self.bank = keras_vera.AdapterBank(model, capacity, folder=folder)
        self.generates = generates

    def answers(self, requests):
        """Answers a batch: one that fails does not fail the others.

        Args:
            requests: List of objects from outside. A right one is a dict with
                a `"text"` and the name of a `"user"`; `None` is the base.
        """
        found = [_refusal(request) for request in requests]
        rows = [row for row, refused in enumerate(found) if refused is None]
        # The base fills up, so that batches have few sizes.
        fill = (1 << (len(rows) - 1).bit_length()) - len(rows) if rows else 0
        texts = [requests[row]["text"] for row in rows] + [""] * fill
        users = [requests[row]["user"] for row in rows] + [None] * fill
        for row, answer in zip(rows, self._answers(texts, users)):
            found[row] = self._as_response(answer)
        return found

    def _answers(self, texts, users):
        # So many always fit into memory at once.
        size = self.bank.capacity
        for start in range(0, len(texts), size):
            part = texts[start : start + size], users[start : start + size]
            method = self.bank.predict
            if self.generates:
                method = self.bank.generate
            yield from method(*part, return_exceptions=True)

    def _as_response(self, answer):
        if not isinstance(answer, Exception):
            if isinstance(answer, str):
                return http.HTTPStatus.OK, {"text": answer}
            scores = np.asarray(answer, "float64").tolist()
            return http.HTTPStatus.OK, {"scores": scores, "pid": os.getpid()}
        return self._failure(answer)

    def _failure(self, error):
        status = http.HTTPStatus.UNPROCESSABLE_ENTITY
        if isinstance(error, KeyError):
            status = http.HTTPStatus.NOT_FOUND
        elif isinstance(error, keras_vera.AdapterFileError):
            # The folder is away, or the file damaged or of another base.
            status, _ = self.health()
            if status == http.HTTPStatus.OK:
                status = http.HTTPStatus.INTERNAL_SERVER_ERROR
        return status, {"error": str(error)}

    def put(self, user, content):
        """Takes the bytes of an adapter file, also in the place of another."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "new.vera.safetensors")
            with open(file, "wb") as opened:
                opened.write(content)
            try:
                # Only what fits the base gets into the folder.
                self.bank.load(user, file, replace=True)
            except ValueError as error:
                away, _ = self.health()
                if away != http.HTTPStatus.OK:
                    return self._failure(error)
                return http.HTTPStatus.BAD_REQUEST, {"error": str(error)}
        return http.HTTPStatus.OK, {"user": user}

    def remove(self, user):
        try:
            self.bank.remove(user)
        except keras_vera.AdapterFileError as error:
            return self._failure(error)
        return http.HTTPStatus.OK, {"user": user}

    def users(self):
        try:
            return http.HTTPStatus.OK, {"users": self.bank.names}
        except keras_vera.AdapterFileError as error:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}

    def health(self):
        """Says whether users can be answered: 503 while the folder is away.

        No replica has to be started again for that: it answers as soon as the
        folder is back. It does not answer from memory meanwhile, as nobody
        knows which adapters were replaced or removed.
        """
        try:
            _ = "anybody" in self.bank
        except keras_vera.AdapterFileError as error:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}
        return http.HTTPStatus.OK, {"pid": os.getpid()}

    def handle(self, method, path, content):
        """Answers what is no request of a batch; see the top of this file.

        Args:
            method: String, of HTTP.
            path: String, unquoted.
            content: Bytes.
        """
        first, _, user = path.lstrip("/").partition("/")
        if (method, first) == ("GET", "health"):
            return self.health()
        if (method, first, user) == ("GET", "users", ""):
            return self.users()
        if method == "PUT" and first == "users" and user:
            return self.put(user, content)
        if method == "DELETE" and first == "users" and user:
            return self.remove(user)
        return http.HTTPStatus.NOT_FOUND, {"error": f"{method} {path}"}


def _refusal(request):
    """Returns the response to what is no request, or `None`."""
    if not isinstance(request, dict) or not {"user", "text"} <= set(request):
        error = "A request is a JSON object with 'user' and 'text'."
        return http.HTTPStatus.BAD_REQUEST, {"error": error}
    user = request["user"]
    # A bank takes an empty name for the base.
    if user is not None and (not isinstance(user, str) or not user):
        error = "'user' must be a name, or null for the base."
        return http.HTTPStatus.BAD_REQUEST, {"error": error}
    return None


def make_replica(args):
    generates = args.task == "generate"
    return Replica(make_model(args), args.folder, args.capacity, generates)


class Batches:
    """Puts together what comes while a batch is computed.

    `serve.batch` closes a batch after some milliseconds, whether or not the
    one before is done, so that under load there were many small ones.

    Args:
        compute: Function of a list of requests that returns as many answers.
        size: Integer, the largest batch.
    """

    def __init__(self, compute, size):
        self._compute, self._size = compute, size
        self._waiting, self._turn = [], asyncio.Lock()

    async def answers(self, requests):
        loop = asyncio.get_running_loop()
        own = [(request, loop.create_future()) for request in requests]
        self._waiting += own
        async with self._turn:
            # Who came before may have computed them already.
            while not all(answer.done() for _, answer in own):
                await self._compute_next()
        return await asyncio.gather(*(answer for _, answer in own))

    async def _compute_next(self):
        batch = self._waiting[: self._size]
        self._waiting = self._waiting[self._size :]
        requests = [request for request, _ in batch]
        try:
            # The event loop goes on gathering meanwhile.
            answers = await asyncio.to_thread(self._compute, requests)
        except BaseException as error:
            for _, answer in batch:
                answer.set_exception(error)
        else:
            for (_, answer), found in zip(batch, answers):
                answer.set_result(found)


# ---- Ray Serve.


def make_application(args):
    from ray import serve
    from starlette.responses import JSONResponse

    @serve.deployment(
        num_replicas=args.replicas, max_ongoing_requests=4 * args.batch
    )
    class Service:
        def __init__(self, args):
            self.replica = make_replica(args)
            self.replica.answers([{"user": None, "text": ""}])  # Compiles.
            self.batches = Batches(self.replica.answers, args.batch)

        @serve.batch(
            max_batch_size=args.batch,
            batch_wait_timeout_s=args.wait,
            max_concurrent_batches=4 * args.batch,
        )
        async def answers(self, requests):
            return await self.batches.answers(requests)

        async def __call__(self, request):
            content = await request.body()
            if request.method == "POST":
                try:
                    asked = json.loads(content)
                except ValueError:
                    asked = None
                status, body = await self.answers(asked)
            else:
                status, body = await asyncio.to_thread(
                    self.replica.handle,
                    request.method,
                    request.scope["path"],
                    content,
                )
            return JSONResponse(body, status)

    return Service.bind(args)


def serve_with_ray(args):
    import ray
    from ray import serve

    ray.init(include_dashboard=False, num_cpus=args.replicas)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(make_application(args), blocking=True)


# ---- The HTTP server of Python, without batches.


def serve_plainly(args):
    replica = make_replica(args)

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self):
            size = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(size)
            if self.command == "POST":
                try:
                    asked = json.loads(content)
                except ValueError:
                    asked = None
                ((status, body),) = replica.answers([asked])
            else:
                path = urllib.parse.unquote(self.path)
                status, body = replica.handle(self.command, path, content)
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_DELETE = respond

        def log_message(self, *args):
            pass

    address = "127.0.0.1", args.port
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()


def main():
    args = parse_arguments()
    args.folder = os.path.abspath(args.folder)
    os.makedirs(args.folder, exist_ok=True)
    {"ray": serve_with_ray, "plain": serve_plainly}[args.server](args)


if __name__ == "__main__":
    main()
