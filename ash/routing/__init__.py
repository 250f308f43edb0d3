"""Which slice answers a turn: anchors -> calibrated head -> policy. Pure; vectors come in from outside."""
