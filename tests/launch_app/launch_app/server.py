"""Exchange empty messages with every node, then end as the run configuration says."""

import time
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    for server_round in range(int(config["num-rounds"])):
        while not (node_ids := list(grid.get_node_ids())):
            time.sleep(0.1)
        messages = [
            Message(RecordDict(), dst_node_id=i, message_type=MessageType.QUERY, group_id=str(server_round))
            for i in node_ids
        ]
        replies = list(grid.send_and_receive(messages, timeout=60))
        print(f"round {server_round}: {sum(not reply.has_error() for reply in replies)} replies", flush=True)
    if config["marker"]:
        Path(str(config["marker"])).touch()
    if config["behaviour"] == "raise":
        raise ValueError("the app was asked to fail")
    if config["behaviour"] == "sleep":
        time.sleep(600)
