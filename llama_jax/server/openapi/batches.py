"""The OpenAPI description of files and batches."""

from typing import Any

_STRING = {"type": "string"}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_ABSENT = {404: "It is not here, or the server stores no batches."}
_FULL = {507: "There is no room for more."}
_BUSY = {503: "Too many uploads are under way, or the server is shutting down."}
_CONFLICT = {409: "It is in use, or has ended."}


def batch_paths(base: str, refusals: Any) -> dict[str, Any]:
    """Return the paths of files and batches.

    Args:
        base: what they begin with.
        refusals: returns the responses of errors, by their statuses and texts.
    """

    def operation(
        summary: str, answer: dict[str, Any], *parameters: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        errors = refusals(_ABSENT | more.pop("errors", {}))
        ok = {"200": {"description": "Success.", "content": answer}}
        return {"summary": summary, "parameters": [*parameters], "responses": ok | errors, **more}

    file_id, batch_id = _path("file_id"), _path("batch_id")
    page = (_query("after", _STRING), _query("limit", {"type": "integer", "minimum": 1}))
    listing = (*page, _query("order", {"enum": ["asc", "desc"]}), _query("purpose", _STRING))
    form = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    body = {"required": True, "content": _json("BatchRequest")}
    binary = {"application/octet-stream": {"schema": {}}}
    cancel = f"{base}/batches/{{batch_id}}/cancel"
    return {
        f"{base}/files": {
            "get": operation("List files.", _json("FileList"), *listing),
            "post": operation(
                "Upload a file.", _json("FileObject"), requestBody=form, errors=_FULL | _BUSY
            ),
        },
        f"{base}/files/{{file_id}}": {
            "get": operation("Get a file.", _json("FileObject"), file_id),
            "delete": operation("Delete a file.", _json("FileDeleted"), file_id, errors=_CONFLICT),
        },
        f"{base}/files/{{file_id}}/content": {
            "get": operation("Read a file.", binary, file_id),
        },
        f"{base}/batches": {
            "get": operation("List batches, the latest first.", _json("BatchList"), *page),
            "post": operation(
                "Create a batch.", _json("BatchObject"), requestBody=body, errors=_FULL
            ),
        },
        f"{base}/batches/{{batch_id}}": {
            "get": operation("Get a batch.", _json("BatchObject"), batch_id),
        },
        cancel: {
            "post": operation("Cancel a batch.", _json("BatchObject"), batch_id, errors=_CONFLICT),
        },
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _STRING}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}
