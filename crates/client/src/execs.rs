//! Execs: commands that run in VMs.

use crate::attachment::Attachment;
use crate::error::ClientError;
use crate::http::{ApiRequest, Client, OPERATION_TIMEOUT, QUERY_TIMEOUT, vm_path};
use crate::output_stream::OutputStream;
use crate::transport;
use scalebox_api::{
    CreateExec, Exec, ExecId, ExecList, ExecResult, Signal, SignalExec, StartedExec, VmStats, WindowSize,
};
use std::io::{Cursor, Read};
use std::time::Duration;
use ureq::http::Method;

const NDJSON: &str = "application/x-ndjson";

impl Client {
    /// Sends `POST /vms/{vm}/exec`, and waits until the command has ended.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn run_exec(&self, vm: &str, request: &CreateExec) -> Result<ExecResult, ClientError> {
        let seconds = request.timeout_seconds.unwrap_or(CreateExec::MAX_TIMEOUT_SECONDS);
        let timeout = QUERY_TIMEOUT + Duration::from_secs(seconds);
        let call = ApiRequest::new(self, Method::POST, &(vm_path(vm) + "/exec"), timeout);
        let body = serde_json::to_vec(request).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body))?.json()
    }

    /// Sends `POST /vms/{vm}/exec`, and returns the command's output while it runs.
    ///
    /// # Errors
    /// See [`ClientError`]. The stream reports later failures.
    pub fn stream_exec(&self, vm: &str, request: &CreateExec) -> Result<OutputStream, ClientError> {
        let call = ApiRequest::new(self, Method::POST, &(vm_path(vm) + "/exec"), OPERATION_TIMEOUT);
        let body = serde_json::to_vec(request).map_err(|error| call.protocol(error.to_string()))?;
        // A command may be silent for any time.
        let (response, call) = call.begin(NDJSON, Some(body), None)?;
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(OutputStream::new(body, call.to_string(), false))
    }

    /// Sends `POST /vms/{vm}/exec` with `background`. Returns the id when the command has started.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn start_exec(&self, vm: &str, request: &CreateExec) -> Result<ExecId, ClientError> {
        let request = CreateExec {
            background: true,
            ..request.clone()
        };
        self.send_json(Method::POST, &(vm_path(vm) + "/exec"), &request)
            .map(|StartedExec { exec }| exec)
    }

    /// Sends `GET /vms/{vm}/execs`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn execs(&self, vm: &str) -> Result<Vec<Exec>, ClientError> {
        self.get(&(vm_path(vm) + "/execs")).map(|ExecList { execs }| execs)
    }

    /// Sends `GET /vms/{vm}/execs/{exec}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn exec(&self, vm: &str, exec: &ExecId) -> Result<Exec, ClientError> {
        self.get(&exec_path(vm, exec, ""))
    }

    /// Sends `GET /vms/{vm}/execs/{exec}/output`: the output from an offset on. With `follow`, the
    /// stream ends when the command does.
    ///
    /// # Errors
    /// See [`ClientError`]. The stream reports later failures.
    pub fn exec_output(&self, vm: &str, exec: &ExecId, since: u64, follow: bool) -> Result<OutputStream, ClientError> {
        let path = exec_path(vm, exec, &format!("/output?since={since}&follow={follow}"));
        let (response, call) = ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT).begin(NDJSON, None, None)?;
        let body = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(OutputStream::new(body, call.to_string(), !follow))
    }

    /// Sends `POST /vms/{vm}/execs/{exec}/stdin`; `close` ends stdin after the bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_stdin(&self, vm: &str, exec: &ExecId, bytes: Vec<u8>, close: bool) -> Result<(), ClientError> {
        let path = exec_path(vm, exec, &format!("/stdin?close={close}"));
        let length = bytes.len() as u64;
        ApiRequest::new(self, Method::POST, &path, OPERATION_TIMEOUT)
            .upload(Cursor::new(bytes), Some(length))
            .map(drop)
    }

    /// Sends `POST /vms/{vm}/execs/{exec}/signal`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn signal_exec(&self, vm: &str, exec: &ExecId, signal: Signal) -> Result<(), ClientError> {
        self.control(&exec_path(vm, exec, "/signal"), &SignalExec { signal })
    }

    /// Sends `POST /vms/{vm}/execs/{exec}/resize`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resize_exec(&self, vm: &str, exec: &ExecId, size: WindowSize) -> Result<(), ClientError> {
        self.control(&exec_path(vm, exec, "/resize"), &size)
    }

    fn control(&self, path: &str, body: &impl serde::Serialize) -> Result<(), ClientError> {
        let call = ApiRequest::new(self, Method::POST, path, OPERATION_TIMEOUT);
        let body = serde_json::to_vec(body).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body)).map(drop)
    }

    /// Connects to the input and output of an exec (`GET /vms/{vm}/execs/{exec}/attach`), from an
    /// offset of its output on. The connection ignores proxies in the environment.
    ///
    /// # Errors
    /// See [`ClientError`]. The attachment reports later failures.
    pub fn attach(&self, vm: &str, exec: &ExecId, since: u64) -> Result<Attachment, ClientError> {
        let path = exec_path(vm, exec, &format!("/attach?since={since}"));
        let call = ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT);
        let connected = transport::connect(&call, self.authorization());
        match connected {
            Ok(socket) => Attachment::start(socket, call.to_string()),
            // The library does not return the complete body of the response; this call does.
            Err(error @ ClientError::Protocol { .. }) => match self.exec(vm, exec) {
                Err(refused) => Err(refused),
                Ok(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Sends `GET /vms/{vm}/stats`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stats(&self, vm: &str) -> Result<VmStats, ClientError> {
        self.get(&(vm_path(vm) + "/stats"))
    }

    /// Sends `GET /vms/{vm}/console`: the log of the VM's console. `tail` limits it to its last
    /// bytes; with `follow`, the stream continues with new output.
    ///
    /// # Errors
    /// See [`ClientError`]. The reader reports later failures.
    pub fn console(&self, vm: &str, tail: Option<u64>, follow: bool) -> Result<Box<dyn Read + Send>, ClientError> {
        let tail = tail.map_or_else(String::new, |tail| format!("&tail={tail}"));
        let path = format!("{}/console?follow={follow}{tail}", vm_path(vm));
        let call = ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT);
        let (response, _) = call.begin("text/plain", None, None)?;
        Ok(Box::new(
            response.into_body().into_with_config().limit(u64::MAX).reader(),
        ))
    }
}

fn exec_path(vm: &str, exec: &ExecId, rest: &str) -> String {
    format!("{}/execs/{exec}{rest}", vm_path(vm))
}
