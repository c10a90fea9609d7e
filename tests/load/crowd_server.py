"""A server process with the plain scheme, for crowds: its memory is its own. Ends with standard input."""

import asyncio
import json
import sys
from pathlib import Path

import plain_scheme
from blindsum.aggregator.embedding import AggregatorServer, configure_logs
from scripted_federation import settings_for


async def serve(directory: str) -> None:
    settings = settings_for(Path(directory), presence_grace=60, max_pending_joins=2000, upload_slots=100)
    server = AggregatorServer(settings, schemes=plain_scheme.scheme, scheme_factory="plain_scheme:scheme")
    await server.start()
    ready = [server.enrolment_port, server.member_port, server.ca_pem.decode()]
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=0.5)


if __name__ == "__main__":
    configure_logs("ERROR", json=False)
    asyncio.run(serve(sys.argv[1]))
