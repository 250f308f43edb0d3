"""The network face of Ash: `ash.v1` and plain chat over WebSocket, health and metrics over HTTP."""
