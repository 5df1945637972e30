"""forward_port.py ADDRESS PORT: accepts on ADDRESS:PORT and passes bytes to 127.0.0.1:PORT, both ways, until it is ended."""
import socket
import sys
import threading


def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass  # a closed side: the other direction ends by the shutdown below
    for side in (source, target):
        try:
            side.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def main():
    address, port = sys.argv[1], int(sys.argv[2])
    server = socket.create_server((address, port))
    while True:
        outside, _ = server.accept()
        inside = socket.create_connection(("127.0.0.1", port))
        for source, target in ((outside, inside), (inside, outside)):
            threading.Thread(target=pump, args=(source, target), daemon=True).start()


if __name__ == "__main__":
    main()
