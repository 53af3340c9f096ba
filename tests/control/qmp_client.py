"""A QMP client of few lines, as a user would write it: pauses the machine, looks, lets it go on."""
import json
import socket
import sys

connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(sys.argv[1])
stream = connection.makefile("rw")


def execute(command, **arguments):
    stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    stream.flush()
    while True:
        message = json.loads(stream.readline())
        if "event" not in message:
            return message
        print(message["event"])


greeting = json.loads(stream.readline())["QMP"]
execute("qmp_capabilities")
print(greeting["version"]["package"].split("-")[0], execute("query-status")["return"]["status"])
execute("stop")
print(execute("query-status")["return"]["status"])
execute("cont")
print(execute("nonsense")["error"]["desc"])
