"""The contract with every asynq program, in any language: keys, messages, numbers. No I/O.

keys      names of keys and channels, cluster slots
messages  what stands in Redis, as frozen dataclasses
codec     bytes <-> messages; the only module that knows protobuf
limits    numbers that every program must agree on
"""
