"""Ask a chat server, time its streams, and sum up: for `vtprune bench`, and for the load tests of a clone.

`client` sends one request, `sse` reads its stream, `records` defines every time, `results` and `ratios` compute from
records, and `page` draws and writes a page of HTML.
"""
