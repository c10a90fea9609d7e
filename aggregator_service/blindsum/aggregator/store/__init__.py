"""State and blobs behind two small interfaces: SQLite and files now, a database and objects later."""
