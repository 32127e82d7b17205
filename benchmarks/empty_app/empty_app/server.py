"""Play rounds of empty messages and write down how long each takes; fedtalora's server looks for replies as often."""

import json
import time
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then play the rounds."""
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(str(config["num-clients"])):
        time.sleep(0.1)
    with (Path(str(config["out"])) / "rounds.jsonl").open("w", buffering=1) as file:
        for _ in range(int(str(config["num-rounds"]))):
            began = time.monotonic()
            asked = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
            missing = set(grid.push_messages(asked))
            while missing:
                missing -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(missing)}
                waited = time.monotonic() - began
                time.sleep(min(1.0, max(0.05, waited / 20)) if missing else 0)
            file.write(json.dumps({"seconds": {"total": time.monotonic() - began, "evaluate": 0.0}}) + "\n")
