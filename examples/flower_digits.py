"""Federated learning by Flower: three hospitals, say, train one network together, and none shows its images.

    pip install fastops[federated] scikit-learn
    python examples/flower_digits.py

`client` and `server` are Flower's apps, which `flwr run` starts on real machines. Flower's simulation of many clients
needs ray; `InProcess` below needs nothing, and is enough to try an app out: it calls the clients one after the other.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastops

try:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[federated] scikit-learn") from None

CLIENTS = 3
ROUNDS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def part(client: int) -> tuple[Tensor, Tensor]:
    """A client's images: 299, 479 and 659 of them. Client 3 is who tests, with 360."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    mine = order[[0, 299, 778, 1437][client] : [299, 778, 1437, 1797][client]]
    return torch.tensor(data.images, dtype=torch.float32)[mine, None] / 16, torch.tensor(data.target)[mine]


def train(model: nn.Module, client: int) -> int:
    """One epoch on the client's images. Returns how many these are."""
    images, classes = part(client)
    images = images.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in zip(images.split(32), classes.split(32), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(images)


def accuracy(model: nn.Module) -> float:
    images, classes = part(CLIENTS)
    with torch.no_grad():
        return (model(images).argmax(1) == classes).float().mean().item()


# ---- Flower's apps ---------------------------------------------------------------------------------------------------

client = ClientApp()


@client.train()
def train_here(message: Message, context: Context) -> Message:
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    fastops.replace_(model)  # the one line; what is sent back is a state_dict as ever
    count = train(model, int(context.node_config["partition-id"]))
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": count})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def average(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    result = strategy.start(grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=ROUNDS)
    context.state["arrays"] = result.arrays


# ---- all of it in one process ----------------------------------------------------------------------------------------


class InProcess(Grid):
    """The machines of a federation, as far as a strategy asks for them: it calls the client's app for each."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        self.app = app
        # Whose messages these are, which `flwr run` knows and a process of its own has to say.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.contexts = {
            number + 1: Context(1, number + 1, {"partition-id": number}, RecordDict(), {}) for number in range(clients)
        }
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbered = {str(len(self.replies) + i): one for i, one in enumerate(self.send_and_receive(messages))}
        self.replies |= numbered
        return list(numbered)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies[one] for one in message_ids]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run


def simulate() -> nn.Module:
    """The network that all clients have trained."""
    context = Context(1, 0, {}, RecordDict(), {})
    server(InProcess(client, CLIENTS), context)
    model = network()
    model.load_state_dict(context.state["arrays"].to_torch_state_dict())
    return model


def main() -> None:
    with fastops.record() as calls:
        model = simulate()
    print(f"{CLIENTS} clients, {ROUNDS} rounds: accuracy {accuracy(model):.3f}, {len(calls)} kernel calls")


if __name__ == "__main__":
    main()
