"""The ground floor: events, values, ports and errors. Imports the standard library and msgspec only."""
