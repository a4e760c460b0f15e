import os
import threading
from http.server import ThreadingHTTPServer

import pytest

from tests.pretrain.wandb_server import Backend


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    """A machine on which nobody has ever used W&B."""
    import wandb

    folder = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    yield folder
    wandb.teardown()


@pytest.fixture
def backend(monkeypatch):
    """A W&B server of this test's own: see `Backend`."""
    import wandb

    Fresh = type("Fresh", (Backend,), {"rows": {}, "runs": {}, "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    Fresh.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", Fresh.url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Fresh
    wandb.teardown()
    server.shutdown()
    thread.join()
    server.server_close()
