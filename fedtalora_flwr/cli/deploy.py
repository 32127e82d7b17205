"""The commands of a deployment. Each does one step, and leaves alone what is done already."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtalora_flwr.deploy.folder import DeployError, FederationFolder, require_folders

Dir = Annotated[
    Path,
    typer.Option("--dir", envvar="FEDTALORA_DIR", help="This machine's folder of the federation: keys, state, logs."),
]
Name = Annotated[str, typer.Argument(help="The node's name: letters, digits, - and _.")]
ControlPort = Annotated[int, typer.Option(help="Port on 127.0.0.1 for flwr and the SuperExec.")]
ServerData = Annotated[
    str, typer.Option("--data", help="Folder of the known data sets here (FEDTALORA_DATA), with a run's test data.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="WITHOUT TLS AND NODE KEYS: anyone on the network may join.")
]
Background = Annotated[
    bool, typer.Option("--background", help="Start it, wait until it is up, and return; if it ends, it starts again.")
]
Print = Annotated[bool, typer.Option("--print", help="Print Flower's command line instead of running it.")]
LabFile = Annotated[Path, typer.Argument(metavar="LAB", help="The lab's file, such as deploy/lab.yaml.")]

DEFAULT_DIR = Path("federation")
node = typer.Typer(name="node", help="Keys of the nodes, and which of them may come in.", no_args_is_help=True)
lab = typer.Typer(
    name="lab", help="A whole federation from one file, over ssh or on this machine.", no_args_is_help=True
)


def certs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names and addresses by which nodes call the server.")
    ] = None,
    directory: Dir = DEFAULT_DIR,
    days: Annotated[int, typer.Option(min=1, help="Days that the server's certificate is valid.")] = 397,
    renew: Annotated[bool, typer.Option("--renew", help="Make the server's certificate anew, by the same CA.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print ca.crt, which every node needs.")] = False,
) -> None:
    """On the server: make the CA and the server's certificate, or renew the certificate where it is due.

    fedtalora certs superlink.lab 10.0.0.5

    Give every name that a node uses; localhost and 127.0.0.1 are always in. Nothing that is there and good is
    touched, and the CA never is: the nodes trust it, and need nothing new when the certificate is renewed. Restart the
    SuperLink after a renewal.
    """
    from fedtalora_flwr.deploy.certs import make_certificates

    folder = _folder(directory)
    if show:
        if not folder.ca_certificate.exists():
            raise DeployError(f"{folder.ca_certificate} is not there; make it: fedtalora certs NAME")
        print(folder.ca_certificate.read_text(), end="")
        return
    found = make_certificates(folder, names or (), days=days, renew=renew)
    made = f"made: {', '.join(found.made)}" if found.made else "nothing to do"
    print(f"certificates in {folder.root}: {made}; for {', '.join(found.names)} until {found.expires:%Y-%m-%d}")


def superlink(
    directory: Dir = DEFAULT_DIR,
    fleet: Annotated[str, typer.Option(help="Address and port where nodes call.")] = "0.0.0.0:9092",
    data: ServerData = "",
    control_port: ControlPort = 8000,
    separate_superexec: Annotated[
        bool, typer.Option("--separate-superexec", help="ServerApps run under fedtalora superexec.")
    ] = False,
    insecure: Insecure = False,
    background: Background = False,
    show: Print = False,
) -> None:
    """On the server: run the SuperLink. Only the port of --fleet can be reached from other machines.

    fedtalora superlink --background

    Anyone who can log in here can run code on every node, for Flower's own command asks for no password: keep
    this machine to those who may.
    """
    from fedtalora_flwr.deploy import background as in_background
    from fedtalora_flwr.deploy import processes
    from fedtalora_flwr.deploy.commands import environment, superlink_command, watched, write_connection
    from fedtalora_flwr.deploy.probe import healthy

    folder = _folder(directory)
    command = superlink_command(
        folder,
        fleet_address=fleet,
        control_port=control_port,
        separate_superexec=separate_superexec,
        insecure=insecure,
    )
    if show:
        _print_command(command)
        return
    if insecure:
        _shout("this SuperLink has no TLS and takes every node: data of a run is open to the network")
    elif not folder.server_certificate.exists():
        raise DeployError(f"no certificate in {folder.root}; make it first: fedtalora certs NAME-OF-THIS-SERVER")
    require_folders(data=data)
    folder.make()
    line = [*command, f"--data={_resolved(data)}"]
    if background and _runs_already(folder, "superlink", line):
        print(f"to submit runs here: export FLWR_HOME={folder.flower_home}")
        return
    _stop_other(folder, "superlink", line, background=background)
    write_connection(folder, control_port=control_port, insecure=insecure)
    env = environment(folder, data=data)
    if not background:
        processes.become(folder, "superlink", watched(command), env)
    in_background.start(
        folder, "superlink", watched(command), env, ready=lambda: healthy(folder, port=control_port, insecure=insecure)
    )
    pid = processes.pid_of(folder, "superlink")
    print(f"superlink runs, as process {pid}; nodes call {fleet}; log {folder.log('superlink')}")
    print(f"to submit runs here: export FLWR_HOME={folder.flower_home}")


def superexec(
    directory: Dir = DEFAULT_DIR,
    data: ServerData = "",
    control_port: ControlPort = 8000,
    insecure: Insecure = False,
    show: Print = False,
) -> None:
    """On the server: run what starts ServerApps, beside fedtalora superlink --separate-superexec."""
    from fedtalora_flwr.deploy import processes
    from fedtalora_flwr.deploy.commands import environment, superexec_command, watched

    folder = _folder(directory)
    command = superexec_command(folder, control_port=control_port, insecure=insecure)
    if show:
        _print_command(command)
        return
    require_folders(data=data)
    folder.make()
    processes.become(folder, "superexec", watched(command), environment(folder, data=data))


def supernode(
    name: Name,
    superlink: Annotated[str, typer.Option(help="The server as host:port; the host is in its certificate.")],
    partition_id: Annotated[int, typer.Option(min=0, help="Which part of the data it holds; 0 to num-clients - 1.")],
    directory: Dir = DEFAULT_DIR,
    data: Annotated[str, typer.Option(help="Folder of the known data sets here (FEDTALORA_DATA).")] = "",
    data_path: Annotated[
        str, typer.Option(help="Folder of the node's own data, a subfolder a class (dataset=nodes).")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, cuda:0,1: the devices it may use; all.")] = "",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; another for each node of this machine.")] = 9094,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Load libraries, model and data anew for each message: slower, no memory kept."),
    ] = False,
    insecure: Insecure = False,
    background: Background = False,
    show: Print = False,
) -> None:
    """On a node: run the SuperNode, after a look at the server that says what Flower would not.

    fedtalora supernode site0 --superlink superlink.lab:9092 --partition-id 0 --data /data --background
    """
    from fedtalora_flwr.deploy import background as in_background
    from fedtalora_flwr.deploy import processes
    from fedtalora_flwr.deploy.commands import environment, supernode_command, watched
    from fedtalora_flwr.deploy.probe import check_clock, check_superlink, online

    folder = _folder(directory)
    command = supernode_command(
        name,
        folder,
        superlink=superlink,
        partition_id=partition_id,
        data_path=data_path,
        port=port,
        insecure=insecure,
        warm=not cold,
    )
    if show:
        _print_command(command)
        return
    require_folders(data=data, data_path=data_path)
    folder.make()
    line = [*command, f"--data={_resolved(data)}", f"--device={device}"]
    if background and _runs_already(folder, name, line):
        return
    if insecure:
        _shout(f"{name} calls without TLS: it runs code from whoever answers at {superlink}")
    else:
        if not folder.node_key(name).exists():
            raise DeployError(f"no key of {name} in {folder.root}; make it first: fedtalora node key {name}")
        try:
            check_superlink(superlink, folder)
            check_clock(superlink, folder, name)
        except DeployError as refusal:
            processes.note(folder, name, str(refusal))
            raise
    env = environment(folder, superlink=superlink, data=data, device=device)
    _stop_other(folder, name, line, background=background)
    if not background:
        processes.become(folder, name, watched(command), env)
    in_background.start(folder, name, watched(command), env, ready=lambda: online(folder, name))
    print(f"{name} is online, as process {processes.pid_of(folder, name)}; log {folder.log(name)}")


@node.command("key")
def node_key(
    name: Name,
    directory: Dir = DEFAULT_DIR,
    ca: Annotated[str, typer.Option(help="The server's ca.crt, to be kept here; - reads it from standard input.")] = "",
    new: Annotated[bool, typer.Option("--new", help="Throw the present key away first.")] = False,
) -> None:
    """On a node: make its key pair, keep the server's ca.crt, and print the public key.

    fedtalora node key site0 --ca ca.crt > site0.pub

    The private key stays here. Take the public key to the server, and there: fedtalora node add site0 site0.pub
    """
    from fedtalora_flwr.deploy.nodes import make_node_key, trust

    folder = _folder(directory)
    if ca:
        trust(folder, _read(ca))
    if new:
        folder.node_key(name).unlink(missing_ok=True)
        folder.node_public_key(name).unlink(missing_ok=True)
    make_node_key(folder, name)
    print(folder.node_public_key(name).read_text(), end="")


@node.command("add")
def node_add(
    name: Name,
    public_key: Annotated[str, typer.Argument(help="The file that fedtalora node key printed; - reads it.")] = "",
    directory: Dir = DEFAULT_DIR,
) -> None:
    """On the server: let a node in. The SuperLink must be running."""
    from fedtalora_flwr.deploy.nodes import register

    added = register(_folder(directory), name, _read(public_key) if public_key else None)
    print(f"{name} {'may come in' if added else 'was in already'}")


@node.command("replace")
def node_replace(
    name: Name,
    public_key: Annotated[str, typer.Argument(help="The new machine's public key; - reads it.")],
    directory: Dir = DEFAULT_DIR,
) -> None:
    """On the server: let a new machine, or a new key, in a node's place; the old key is shut out for good."""
    from fedtalora_flwr.deploy.nodes import replace

    changed = replace(_folder(directory), name, _read(public_key))
    print(f"{name} {'may come in with its new key' if changed else 'has that key already'}")


@node.command("remove")
def node_remove(name: Name, directory: Dir = DEFAULT_DIR) -> None:
    """On the server: shut a node out; if it runs, it ends within seconds. Its key is of no more use."""
    from fedtalora_flwr.deploy.nodes import unregister

    print(f"{name} {'is shut out' if unregister(_folder(directory), name) else 'was not in'}")


@node.command("list")
def node_list(directory: Dir = DEFAULT_DIR) -> None:
    """On the server: list the nodes that may come in: name, id, and registered (never seen), online or offline."""
    from fedtalora_flwr.deploy.nodes import list_nodes

    for found in list_nodes(_folder(directory)):
        print(f"{found.name or '-':20} {found.node_id:20} {found.status}")


def status(
    name: Annotated[str, typer.Argument(help="superlink, or a node's name.")], directory: Dir = DEFAULT_DIR
) -> None:
    """Say whether a process of this folder runs, waits to be started again (see its log), or is stopped."""
    from fedtalora_flwr.deploy.processes import state_of

    print(state_of(_folder(directory), name))


def stop(
    name: Annotated[str, typer.Argument(help="superlink, or a node's name.")], directory: Dir = DEFAULT_DIR
) -> None:
    """Stop a process of this folder with everything that it started."""
    from fedtalora_flwr.deploy.processes import stop as stop_process

    print(f"{name} {'stopped' if stop_process(_folder(directory), name) else 'was not running'}")


def logs(
    name: Annotated[str, typer.Argument(help="superlink, or a node's name.")],
    directory: Dir = DEFAULT_DIR,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 40,
) -> None:
    """Print the last lines of a process that was started with --background."""
    from fedtalora_flwr.deploy.processes import tail

    print(tail(_folder(directory), name, num_lines=lines))


def health(
    name: Annotated[str, typer.Argument(help="superlink, superexec, or a node's name.")], directory: Dir = DEFAULT_DIR
) -> None:
    """Exit with 0 if a process of this folder does its work; with 1, and what is wrong, if not. For health checks.

    The server must list its runs and have none that waits in vain for its SuperExec; a node must have been answered by
    the server within the last minute.
    """
    from fedtalora_flwr.deploy.health import ailment

    if found := ailment(_folder(directory), name):
        print(found)
        raise typer.Exit(1)


@lab.command("up")
def lab_up(file: LabFile) -> None:
    """Start what of the lab does not run: certificates, server, keys, nodes. Again: takes over where it stopped."""
    from fedtalora_flwr.deploy.lab import read_lab, up

    found = read_lab(file)
    if found.insecure:
        _shout(f"{file} says insecure: no TLS, no node keys")
    up(found, print)


@lab.command("status")
def lab_status(file: LabFile) -> None:
    """Show every process of the lab, and which nodes the server sees. Exit status 1 if not all is up."""
    from fedtalora_flwr.deploy.lab import read_lab, state

    found = read_lab(file)
    states = state(found)
    for entry in states:
        print(f"{entry.name:20} {entry.host:24} {entry.process:16} {entry.seen}".rstrip())
    if not all(entry.process.startswith("running") and entry.seen in ("", "online") for entry in states):
        raise typer.Exit(1)


@lab.command("logs")
def lab_logs(
    file: LabFile,
    name: Annotated[str, typer.Argument(help="A node, or superlink.")] = "superlink",
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 40,
) -> None:
    """Print the last lines of a node's log, or of the server's."""
    from fedtalora_flwr.deploy.lab import logs as logs_of
    from fedtalora_flwr.deploy.lab import read_lab

    print(logs_of(read_lab(file), name, num_lines=lines), end="")


@lab.command("down")
def lab_down(file: LabFile) -> None:
    """Stop the nodes and the server. Keys, certificates and the server's state stay for the next time."""
    from fedtalora_flwr.deploy.lab import down, read_lab

    down(read_lab(file), print)


def add_to(cli: typer.Typer) -> None:
    """Add the commands of a deployment to the command line."""
    panel = "On separate machines (deploy/README.md)"
    cli.add_typer(lab, rich_help_panel=panel)
    cli.add_typer(node, rich_help_panel=panel)
    for command in (certs, superlink, superexec, supernode, status, stop, logs, health):
        cli.command(rich_help_panel=panel)(command)


def _runs_already(folder: FederationFolder, name: str, line: list[str]) -> bool:
    """Say that a process runs by this command line, and keep it; False if it does not run, or by another one."""
    from fedtalora_flwr.deploy import background, processes

    pid = processes.pid_of(folder, name)
    if pid is None or processes.other_line(folder, name, line):
        return False
    background.keep(folder, name)
    print(f"{name} runs already, as process {pid}")
    return True


def _stop_other(folder: FederationFolder, name: str, line: list[str], *, background: bool) -> None:
    """Note by which command line a process is started, and stop the one that runs by another."""
    from fedtalora_flwr.deploy import processes

    if background and processes.pid_of(folder, name):
        print(f"{name} is started again, for its command line is another: {processes.other_line(folder, name, line)}")
        processes.stop(folder, name)
    if not processes.pid_of(folder, name):
        processes.note_line(folder, name, line)


def _resolved(folder: str) -> str:
    return str(Path(folder).expanduser().resolve()) if folder else ""


def _folder(directory: Path) -> FederationFolder:
    return FederationFolder(directory.expanduser().resolve())


def _read(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise DeployError(f"{file} cannot be read ({error.strerror}); copy it here first") from None


def _print_command(command: list[str]) -> None:
    import shlex

    print(shlex.join(command))


def _shout(text: str) -> None:
    print(f"{'!' * 72}\n!!! INSECURE: {text}\n{'!' * 72}", file=sys.stderr)
