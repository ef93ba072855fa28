//! Files and directories.
//!
//! Paths are resolved as for any program in the guest: the host owns the guest, so it may follow
//! any symbolic link. Only archives, whose content comes from elsewhere, are confined to their
//! folder.

mod archive;
mod delete;
mod folder;
mod info;
mod kind;
mod list;
mod names;
mod pieces;
mod read;
mod rename;
mod temporary;
mod write;

use crate::accounts::{Account, Owner};
use crate::blocking;
use crate::server::{Failure, Query, Request, Response, json, no_content, no_route};
use hyper::Method;
use scalebox_agent_api::FailureCode;
use std::path::PathBuf;

/// Responds to a request below `/v1/files`; `rest` is the path after it.
pub(crate) async fn respond(request: Request, rest: &[&str]) -> Result<Response, Failure> {
    let query = Query::of(&request);
    match (request.method(), rest) {
        (&Method::GET, []) => read::read(query.path("path")?).await,
        (&Method::PUT, []) => put(&query, request).await,
        (&Method::DELETE, []) => {
            let (path, recursive) = (query.path("path")?, query.flag("recursive")?);
            blocking::run(move || delete::delete(&path, recursive)).await?;
            Ok(no_content())
        }
        (&Method::GET, ["info"]) => properties(query.path("path")?).await,
        (&Method::GET, ["list"]) => list::list(query.path("path")?).await,
        (&Method::GET, ["tar"]) => archive::pack::pack(query.path("path")?).await,
        (&Method::PUT, ["tar"]) => {
            let (path, parents) = (query.path("path")?, query.flag("parents")?);
            let owner = owner(&query).await?;
            archive::unpack::unpack(path, owner, parents, request.into_body()).await?;
            Ok(no_content())
        }
        (&Method::POST, ["mkdir"]) => make_directory(&query).await,
        (&Method::POST, ["rename"]) => {
            let (from, to) = (query.path("path")?, query.path("to")?);
            blocking::run(move || {
                rename::rename(&from, &to)?;
                Ok(json(&info::info(&to)?))
            })
            .await
        }
        _ => Err(no_route(&request)),
    }
}

async fn put(query: &Query, request: Request) -> Result<Response, Failure> {
    let target = write::Target {
        path: query.path("path")?,
        mode: mode(query)?,
        owner: owner(query).await?,
        parents: query.flag("parents")?,
    };
    Ok(json(&write::write(target, request.into_body()).await?))
}

async fn properties(path: PathBuf) -> Result<Response, Failure> {
    blocking::run(move || Ok(json(&info::info(&path)?))).await
}

async fn make_directory(query: &Query) -> Result<Response, Failure> {
    let (path, parents) = (query.path("path")?, query.flag("parents")?);
    let mode = mode(query)?.unwrap_or(folder::DEFAULT_MODE);
    let owner = owner(query).await?;
    blocking::run(move || {
        match parents {
            true => folder::make_all(&path, mode, owner)?,
            false => folder::make(&path, mode, owner)?,
        }
        Ok(json(&info::info(&path)?))
    })
    .await
}

/// Returns the permissions of the query: up to four octal digits.
fn mode(query: &Query) -> Result<Option<u32>, Failure> {
    let Some(text) = query.text("mode")? else {
        return Ok(None);
    };
    let is_octal = (1..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| is_octal);
    let invalid = || Failure::new(FailureCode::Invalid, format!("the parameter mode={text} is not a mode"));
    mode.map(Some).ok_or_else(invalid)
}

/// Returns the owner of the query.
async fn owner(query: &Query) -> Result<Option<Owner>, Failure> {
    let Some(text) = query.text("user")?.map(str::to_owned) else {
        return Ok(None);
    };
    blocking::run(move || Account::find(&text).map(|account| Some(account.owner()))).await
}
