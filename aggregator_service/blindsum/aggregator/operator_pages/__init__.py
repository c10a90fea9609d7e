"""The operators' web page on the admin port: what the server knows, live, and what it can't know, said."""
